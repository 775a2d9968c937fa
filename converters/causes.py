"""Why a tensor is not what it should be: a closed list of defects, each tried on the stored bits.

Every hypothesis predicts all of the actual values from the expected ones (or says what they all are), so a sentence
is given only where it explains the whole tensor. Rows are asked for in blocks: memory stays at a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from converters.arrangements import Structure, arrangements
from converters.casts import convert
from converters.tensors import DTYPE_BITS

Words = npt.NDArray[np.generic]
Index = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Change = Callable[[Bytes], Bytes]
#: Values read at once while a hypothesis is tried.
_BLOCK_VALUES = 1 << 20
_SAMPLED_ROWS = 16
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
_NARROWER: dict[str, tuple[str, ...]] = {"F64": ("F32", "BF16", "F16"), "F32": ("BF16", "F16"), "BF16": ("F16",)}


class Rows(Protocol):
    """One tensor, or one entry of a stack, as a matrix of `rows` by `cols` values of `dtype`."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def cols(self) -> int:
        """Values of a row."""
        ...

    @property
    def dtype(self) -> str:
        """Storage dtype of the values."""
        ...

    def take(self, index: Index) -> Bytes:
        """Bytes of some rows: [len(index), cols * bytes of a value]."""
        ...


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tensor that the values may have been taken from; `what` names it in a sentence."""

    what: str
    rows: Callable[[], Rows]


@dataclass(frozen=True, slots=True)
class Suspect:
    """What is known of a differing tensor beside its values; `first_row` is a row known to differ."""

    structure: Structure = Structure()
    peers: Sequence[Peer] = ()
    first_row: int = 0


def find_cause(expected: Rows, actual: Rows, suspect: Suspect) -> str | None:
    """The likely cause in a few words, None where no hypothesis explains every value.

    Both have the same columns and dtype; `actual` may have fewer rows (a tensor cut short), or be the transposed of
    `expected`, where only that is tried.
    """
    if (actual.rows, actual.cols) == (expected.cols, expected.rows) and actual.rows != expected.rows:
        return "it is transposed" if _transposed(expected, actual) else None
    if actual.cols != expected.cols:
        return None
    if actual.rows != expected.rows:
        return _resized(expected, actual)
    return (
        _content(expected, actual)
        or _one_bit(expected, actual, suspect)
        or _changed_values(expected, actual)
        or _rearranged(expected, actual, suspect)
        or ("it is transposed" if expected.rows == expected.cols and _transposed(expected, actual) else None)
        or _swapped_columns(expected, actual)
        or _taken_from_a_peer(actual, suspect)
        or _lost_rows(expected, actual)
    )


def floats(data: Bytes, dtype: str) -> npt.NDArray[np.float64]:
    """Bytes of any dtype as float64 values, flat; imports torch."""
    import torch

    from converters.values import TORCH_DTYPES

    tensor = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(TORCH_DTYPES[dtype])
    if dtype.startswith("F8"):
        tensor = tensor.to(torch.float32)
    values: npt.NDArray[np.float64] = tensor.to(torch.float64).numpy()
    return values


def _blocks(rows: Rows) -> Iterator[Index]:
    step = max(1, _BLOCK_VALUES // max(1, rows.cols))
    for first in range(0, rows.rows, step):
        yield np.arange(first, min(first + step, rows.rows), dtype=np.int64)


def _words(rows: Rows, index: Index) -> Words:
    """Values of some rows as unsigned words: [len(index), cols]."""
    return rows.take(index).view(_WORDS[DTYPE_BITS[rows.dtype] // 8])


def _sample(rows: Rows, first_row: int) -> Index:
    spread = np.linspace(0, rows.rows - 1, min(_SAMPLED_ROWS, rows.rows)).astype(np.int64)
    return np.unique(np.append(spread, min(first_row, rows.rows - 1)))


# --- what the values are, whatever was expected ------------------------------------------------------------------


def _content(expected: Rows, actual: Rows) -> str | None:
    """NaN, all zero, all the same."""
    total = actual.rows * actual.cols
    if actual.dtype in _FLOATS and (strange := _not_finite(actual)) and strange > _not_finite(expected):
        return (
            "every value is NaN or infinite"
            if strange == total
            else f"{strange} of {total} values are NaN or infinite"
        )
    if total < 2 or not _is_constant(actual) or _is_constant(expected):
        return None
    value = floats(actual.take(np.zeros(1, np.int64)), actual.dtype)[0]
    if value == 0:
        return "every value is zero: it was never written"
    return f"every value is {value:g}: a constant, as an initialiser leaves it"


def _not_finite(rows: Rows) -> int:
    return sum(int((~np.isfinite(floats(rows.take(block), rows.dtype))).sum()) for block in _blocks(rows))


def _is_constant(rows: Rows) -> bool:
    first: object = None
    for block in _blocks(rows):
        words = _words(rows, block)
        first = words.flat[0] if first is None else first
        if not (words == first).all():
            return False
    return True


def _lost_rows(expected: Rows, actual: Rows) -> str | None:
    """Rows that are zero where they should not be, and everything else as expected."""
    zero: list[int] = []
    for block in _blocks(actual):
        wanted, found = _words(expected, block), _words(actual, block)
        wrong = (wanted != found).any(axis=1)
        if (found[wrong] != 0).any():
            return _lost_columns(expected, actual)
        zero += block[wrong].tolist()
    if not zero:
        return None
    first, last = zero[0], zero[-1]
    if last == actual.rows - 1 and len(zero) == last - first + 1:
        return f"the rows from {first} on are zero: it was cut short, or a shard was not written"
    if len(zero) == last - first + 1:
        return f"the rows {first} to {last} are zero: a shard was not written"
    return f"{len(zero)} of {actual.rows} rows are zero"


def _lost_columns(expected: Rows, actual: Rows) -> str | None:
    wrong = np.zeros(actual.cols, bool)
    for block in _blocks(actual):
        wanted, found = _words(expected, block), _words(actual, block)
        if ((wanted != found) & (found != 0)).any():
            return None
        wrong |= (wanted != found).any(axis=0)
    first, last = int(wrong.argmax()), actual.cols - 1 - int(wrong[::-1].argmax())
    return f"the columns {first} to {last} are zero: a shard was not written"


def _resized(expected: Rows, actual: Rows) -> str | None:
    shared = min(expected.rows, actual.rows)
    step = max(1, _BLOCK_VALUES // max(1, actual.cols))
    for first in range(0, shared, step):
        block = np.arange(first, min(first + step, shared), dtype=np.int64)
        if not np.array_equal(_words(expected, block), _words(actual, block)):
            return None
    if actual.rows < expected.rows:
        return f"it was cut to its first {shared} of {expected.rows} rows, which agree"
    return f"{actual.rows - shared} rows follow the {shared} that agree"


# --- values changed one by one -----------------------------------------------------------------------------------


def _one_bit(expected: Rows, actual: Rows, suspect: Suspect) -> str | None:
    where: tuple[int, int] | None = None
    flipped = 0
    for block in _blocks(actual):
        changed = np.bitwise_xor(
            _words(expected, block).astype(np.uint64, copy=False), _words(actual, block).astype(np.uint64, copy=False)
        )
        rows, cols = np.nonzero(changed)
        if len(rows) + (where is not None) > 1:
            return None
        if len(rows):
            where, flipped = (int(block[rows[0]]), int(cols[0])), int(changed[rows[0], cols[0]])
    if where is None or flipped & (flipped - 1):
        return None
    at = list(where) if expected.cols > 1 else [where[0]]
    return f"bit {flipped.bit_length() - 1} of the value at {at} is flipped"


def _changed_values(expected: Rows, actual: Rows) -> str | None:
    """Norm offsets and roundings: functions of single values."""
    dtype = expected.dtype
    if dtype not in _FLOATS:
        return None
    tries: list[tuple[str, Change]] = [
        ("it is the expected plus 1: the other convention of norm weights", _shifted(dtype, 1)),
        ("it is the expected minus 1: the other convention of norm weights", _shifted(dtype, -1)),
        *((f"it was rounded through {through}", _rounded(dtype, through)) for through in _NARROWER.get(dtype, ())),
        ("every sign is turned", _negated(dtype)),
    ]
    for sentence, change in tries:
        if all(np.array_equal(_flat(actual, block), change(_flat(expected, block))) for block in _blocks(actual)):
            return sentence
    return None


def _shifted(dtype: str, shift: int) -> Change:
    return lambda data: convert(data, dtype, dtype, shift)


def _rounded(dtype: str, through: str) -> Change:
    return lambda data: convert(convert(data, dtype, through, 0), through, dtype, 0)


def _negated(dtype: str) -> Change:
    word = _WORDS[DTYPE_BITS[dtype] // 8]
    sign = word(1 << (DTYPE_BITS[dtype] - 1))

    def change(data: Bytes) -> Bytes:
        return np.asarray(data.view(word) ^ sign).view(np.uint8)

    return change


def _flat(rows: Rows, index: Index) -> Bytes:
    return rows.take(index).reshape(-1)


# --- rows in another order ---------------------------------------------------------------------------------------


def _rearranged(expected: Rows, actual: Rows, suspect: Suspect) -> str | None:
    sample = _sample(actual, suspect.first_row)
    found = _words(actual, sample)
    for sentence, order in arrangements(expected.rows, suspect.structure):
        if np.array_equal(found, _words(expected, order[sample])) and _is_ordered(expected, actual, order):
            return sentence
    return None


def _is_ordered(expected: Rows, actual: Rows, order: Index) -> bool:
    return all(np.array_equal(actual.take(block), expected.take(order[block])) for block in _blocks(actual))


# --- other orders, other tensors ---------------------------------------------------------------------------------


def _transposed(expected: Rows, actual: Rows) -> bool:
    """Whether `actual` has for columns the rows of `expected`, tried in tiles of a bounded size."""
    tile = max(1, int(_BLOCK_VALUES // max(expected.cols, actual.cols, 1)))
    for block in _tiles(expected.rows, tile):
        wanted = _words(expected, block)
        for other in _tiles(actual.rows, tile):
            if not np.array_equal(_words(actual, other)[:, block], wanted[:, other].T):
                return False
    return True


def _tiles(rows: int, tile: int) -> Iterator[Index]:
    for first in range(0, rows, tile):
        yield np.arange(first, min(first + tile, rows), dtype=np.int64)


def _swapped_columns(expected: Rows, actual: Rows) -> str | None:
    if expected.cols % 2 or expected.cols < 2:
        return None
    for block in _blocks(actual):
        if not np.array_equal(_words(actual, block), np.roll(_words(expected, block), expected.cols // 2, axis=1)):
            return None
    return "the two halves of its columns are swapped"


def _taken_from_a_peer(actual: Rows, suspect: Suspect) -> str | None:
    sample = _sample(actual, suspect.first_row)[:4]
    found = _words(actual, sample)
    for peer in suspect.peers:
        other = peer.rows()
        if (other.rows, other.cols, other.dtype) != (actual.rows, actual.cols, actual.dtype):
            continue
        if not np.array_equal(_words(other, sample[:1]), found[:1]):
            continue
        if np.array_equal(_words(other, sample), found) and _is_ordered(
            other, actual, np.arange(actual.rows, dtype=np.int64)
        ):
            return f"it holds {peer.what}"
    return None
