"""The one primitive of every fused weight: rows laid out as repeats of [atom 0 | atom 1 | …].

An *atom* is a run of rows that every layout keeps whole or cuts evenly: the query heads, the gate half, …
A tensor that fuses atoms stores them under a `Pack`; converting between two tensors that fuse the same
atoms differently is index algebra on rows, computed by `runs`, and touches no value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pack:
    """`groups` repeats of one row block per atom; `sizes[i]` is the rows of atom i in one repeat.

    Each row stands for `times` rows of its atom.
    """

    groups: int
    sizes: tuple[int, ...]
    times: int = 1

    @property
    def stride(self) -> int:
        """Rows of one repeat."""
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        """Rows of the whole tensor."""
        return self.groups * self.stride

    def slots(self) -> tuple[Slot, ...]:
        """Where each atom's rows lie."""
        return _slots(self)


@dataclass(frozen=True, slots=True)
class Slot:
    """The rows of one atom inside a packed tensor.

    Atom row `k * size + j` is tensor row `k * stride + start + j // times`, for `0 <= k < groups`, `0 <= j < size`.
    """

    start: int
    size: int
    stride: int
    groups: int
    times: int = 1

    @classmethod
    def whole(cls, rows: int) -> Slot:
        """The only atom of a tensor of `rows` rows."""
        return cls(0, rows, rows, 1)

    @property
    def rows(self) -> int:
        """Rows of the atom."""
        return self.groups * self.size

    @property
    def held(self) -> int:
        """Rows of the tensor."""
        return self.rows // self.times


@lru_cache(maxsize=4096)  # a model's layers and experts have the same few packs
def _slots(pack: Pack) -> tuple[Slot, ...]:
    starts = itertools.accumulate(pack.sizes, initial=0)
    return tuple(
        Slot(start, size * pack.times, pack.stride, pack.groups, pack.times)
        for start, size in zip(starts, pack.sizes, strict=False)
    )


@dataclass(frozen=True, slots=True)
class Runs:
    """Maximal row runs shared by two tensors: `length[i]` rows from `source[i]` go to `target[i]`.

    Sorted by `target`; all three arrays have shape [runs].
    """

    source: Rows
    target: Rows
    length: Rows

    def __len__(self) -> int:
        return len(self.length)

    @property
    def shortest(self) -> int:
        """Rows of the shortest run."""
        return int(self.length.min()) if len(self.length) else 0

    def within(self, row: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """What the runs bring to target rows `[row, row + rows)`: (source row, target row, number of rows)."""
        last = int(np.searchsorted(self.target, row + rows))
        for i in range(max(0, int(np.searchsorted(self.target, row, side="right")) - 1), last):
            start = max(row, int(self.target[i]))
            stop = min(row + rows, int(self.target[i] + self.length[i]))
            if start < stop:
                yield int(self.source[i]) + start - int(self.target[i]), start, stop - start


@lru_cache(maxsize=4096)
def runs(source: Slot, target: Slot) -> Runs:
    """Row runs that carry one atom from where `source` keeps it to where `target` does.

    A row of the target that stands for several of the atom is the first of them.
    Law: `runs(a, b)` with source and target exchanged is `runs(b, a)` up to order, where no row stands for several.
    """
    if source.rows != target.rows:
        raise ValueError(f"an atom of {source.rows} rows cannot fill one of {target.rows}")
    edges = np.concatenate(
        [
            np.arange(0, slot.rows + 1, 1 if slot.times > 1 else max(1, slot.size), dtype=np.int64)
            for slot in (source, target)
        ]
    )
    edges.sort()
    edges = edges[np.concatenate(([True], np.diff(edges) > 0))]  # np.unique would import numpy.ma: 20 ms
    first, length = edges[:-1], np.diff(edges)
    if target.times > 1:
        first, length = first[:: target.times], length[:: target.times]
    src, dst = (_rows_at(slot, first) for slot in (source, target))
    if len(first) > 1:
        joined = (src[1:] == src[:-1] + length[:-1]) & (dst[1:] == dst[:-1] + length[:-1])
        heads = np.flatnonzero(np.concatenate(([True], ~joined)))
        src, dst, length = src[heads], dst[heads], np.add.reduceat(length, heads)
    order = np.argsort(dst, kind="stable")
    return Runs(src[order], dst[order], length[order])


def _rows_at(slot: Slot, rows: Rows) -> Rows:
    """Tensor rows of an atom's `rows`."""
    size = max(1, slot.size)
    return np.asarray(rows // size * slot.stride + slot.start + rows % size // slot.times)


@lru_cache(maxsize=256)
def slot_rows(slot: Slot) -> Rows:
    """Rows of a slot in order."""
    return _rows_at(slot, np.arange(slot.rows, dtype=np.int64))
