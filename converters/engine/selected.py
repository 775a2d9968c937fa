"""Source tensors that are a choice: entries of stored tensors, of each some rows and columns, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from converters.engine.regions import Region, matrix
from converters.rows.pack import Rows, Slot
from converters.stored import STRIP_BYTES, Bytes
from converters.tensors import DTYPE_BITS, Shape, StoredTensor

#: Rows no further apart are read in one call, and what lies between them with them: a call costs more.
_NEAR_BYTES = 64 << 10
#: What a choice needs beside the rows that it gives: a strip of what they are taken from, and its columns.
CHOICE_SCRATCH = 2 * STRIP_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """Where an entry comes from: the entry `index` of the tensor `tensor`, of whose matrix `rows` and `cols` stay.

    Both are ascending numbers as the tensor is stored, None where all stay.
    """

    tensor: str
    index: Shape
    rows: Rows | None = None
    cols: Rows | None = None

    @property
    def whole(self) -> bool:
        """Whether the entry stays as it is."""
        return self.rows is None and self.cols is None


@dataclass(frozen=True, slots=True)
class Selected:
    """A tensor as a plan sees it, without chunks, and where each of its entries comes from, by index."""

    tensor: StoredTensor
    entries: Mapping[Shape, Picked]

    def identity(self) -> tuple[object, ...]:
        """What tells two choices apart, for a journal."""
        return tuple(
            (index, p.tensor, p.index, *(None if part is None else part.tobytes() for part in (p.rows, p.cols)))
            for index, p in self.entries.items()
        )


def read_picked(
    picked: Picked,
    origin: StoredTensor,
    row: int,
    rows: int,
    read: Callable[[Region, int, Bytes], None],
    *,
    at_once: bool,
) -> Bytes:
    """Rows `[row, row + rows)` of what is picked of `origin`: [rows, bytes of a row].

    `read` fills rows of a region of `origin`, from a number on. `at_once` reads the whole entry in one call, as codecs
    of stacked tensors need it.
    """
    every, cols = matrix(origin.shape, len(picked.index))
    item = DTYPE_BITS[origin.dtype] // 8
    region = Region(picked.tensor, picked.index, Slot.whole(every))
    wanted = np.arange(row, row + rows) if picked.rows is None else picked.rows[row : row + rows]
    out = np.empty((rows, cols if picked.cols is None else len(picked.cols)), f"u{item}")
    for first, last in [(0, rows)] if at_once else _spans(wanted, cols * item):
        low, high = (0, every) if at_once else (int(wanted[first]), int(wanted[last - 1]) + 1)
        raw = np.empty((high - low, cols * item), np.uint8)
        read(region, low, raw)
        # Clipping changes no index, and makes it four times as fast.
        kept = np.take(raw.view(out.dtype), wanted[first:last] - low, axis=0, mode="clip")
        if picked.cols is None:
            out[first:last] = kept
        else:
            np.take(kept, picked.cols, axis=1, out=out[first:last], mode="clip")
    return out.view(np.uint8).reshape(rows, -1)


def _spans(wanted: Rows, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Stretches of ascending row numbers that are read in one call: gaps are small, all fits a strip."""
    first = 0
    for at in range(1, len(wanted) + 1):
        if at < len(wanted):
            gap = (int(wanted[at]) - int(wanted[at - 1]) - 1) * row_bytes
            span = (int(wanted[at]) - int(wanted[first]) + 1) * row_bytes
            if gap <= _NEAR_BYTES and span <= STRIP_BYTES:
                continue
        yield first, at
        first = at
