"""What causes are looked for in: a tensor as a matrix of stored bits, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from converters.casts import convert
from converters.causes.row_orders import Structure
from converters.tensors import DTYPE_BITS

Words = npt.NDArray[np.generic]
Index = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
#: Values read at once while a hypothesis is tried.
BLOCK_VALUES = 1 << 20
_SAMPLED_ROWS = 16
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))


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


def floats(data: Bytes, dtype: str) -> npt.NDArray[np.float64]:
    """Bytes of any dtype as float64 values, flat."""
    return convert(np.ascontiguousarray(data), dtype, "F64").view(np.float64)


def spans(count: int, step: int) -> Iterator[Index]:
    """The numbers below `count`, `step` at a time."""
    for first in range(0, count, step):
        yield np.arange(first, min(first + step, count), dtype=np.int64)


def blocks(rows: Rows) -> Iterator[Index]:
    return spans(rows.rows, max(1, BLOCK_VALUES // max(1, rows.cols)))


def words(rows: Rows, index: Index) -> Words:
    """Values of some rows as unsigned words: [len(index), cols]."""
    return rows.take(index).view(WORDS[DTYPE_BITS[rows.dtype] // 8])


def sample(rows: Rows, first_row: int) -> Index:
    spread = np.linspace(0, rows.rows - 1, min(_SAMPLED_ROWS, rows.rows)).astype(np.int64)
    return np.unique(np.append(spread, min(first_row, rows.rows - 1)))


def flat(rows: Rows, index: Index) -> Bytes:
    return rows.take(index).reshape(-1)
