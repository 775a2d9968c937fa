"""Values of strangers: lists and mappings that share their parts can be small to store and endless to walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.errors import StorageError

#: Values in all, each counted as often as a walk meets it: Megatron-LM's args have a few hundred.
_MOST_VALUES = 1_000_000
_DEEPEST = 100
#: Sizes and counts take 64 bits, with a sign or without; states of random generators hold 128.
_MOST_BITS = 128


def check_bounded(value: object, source: str) -> None:
    """StorageError, naming `source`, for a value that a walk would not be done with: shared parts, cycles, depth."""
    try:
        _weigh(value, {}, 0)
    except ValueError as error:
        raise StorageError(f"{source}: {error}") from error


def check_plain(value: object, depth: int = 0) -> None:
    """ValueError for what JSON or TOML can say and nobody can go on with.

    Such are an integer that float() refuses, or str() for its digits, and any far above a machine's; text that is no
    Unicode; values nested deeper than other formats can write.
    """
    if depth > _DEEPEST:
        raise ValueError(f"values nested deeper than {_DEEPEST}")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for part in value:
            check_plain(part, depth + 1)
    elif isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise ValueError(f"an integer of {value.bit_length()} bits; at most {_MOST_BITS} are read")
    elif isinstance(value, str) and not value.isascii():
        value.encode()  # half of a surrogate pair: UnicodeEncodeError is a ValueError


def _weigh(value: object, known: dict[int, int], depth: int) -> int:
    """How many values a walk of `value` meets; each container is looked at once, whoever shares it."""
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes | bytearray):
        parts = list(value)
    else:
        check_plain(value)
        return 1
    if (weight := known.get(id(value))) is not None:
        if not weight:
            raise ValueError("a value that contains itself")
        return weight
    if depth > _DEEPEST:
        raise ValueError(f"values nested deeper than {_DEEPEST}")
    known[id(value)] = 0  # being looked at
    weight = 1 + sum(_weigh(part, known, depth + 1) for part in parts)
    if weight > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values, most of them repeated")
    known[id(value)] = weight
    return weight
