"""What a registered conversion between config values is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.errors import UsageError
from converters.rows.expr import Value

Fields = dict[str, Value]


@dataclass(frozen=True, slots=True)
class ValueIso:
    """One Hugging Face value ↔ one Megatron Core value; the second argument is the whole config of that side."""

    to_mcore: Callable[[Value, Mapping[str, Value]], Value]
    to_hf: Callable[[Value, Mapping[str, Value]], Value]


@dataclass(frozen=True, slots=True)
class FieldsIso:
    """A group of Hugging Face keys ↔ a group of Megatron Core fields (`mcore` names them)."""

    mcore: tuple[str, ...]
    to_mcore: Callable[[Mapping[str, Value]], Fields]
    to_hf: Callable[[Mapping[str, Value]], Fields]


def number(value: Value, what: str) -> float:
    """`value` as a finite number; UsageError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"config: {what} is {value!r}, a number was expected")
    return value


def plain(value: float) -> int | float:
    """A number as a config.json has it: without a fraction an int, for which Transformers' classes ask."""
    return int(value) if value == int(value) else value


def positive(value: Value, what: str) -> float:
    """`value` as a finite number above 0; UsageError otherwise."""
    if (found := number(value, what)) <= 0:
        raise UsageError(f"config: {what} is {value!r}, a number above 0 was expected")
    return found


def whole(value: Value, what: str) -> int:
    """`value` as a whole number, 4.0 being one; UsageError otherwise."""
    if (found := number(value, what)) != int(found):
        raise UsageError(f"config: {what} is {value!r}, a whole number was expected")
    return int(found)


def layers_of(config: Mapping[str, Value], key: str) -> int:
    """A count in a config; UsageError where it is absent."""
    return whole(config.get(key), key)
