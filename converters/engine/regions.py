"""Regions of stored tensors, seen as matrices of rows, and the moves that carry atoms between them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from converters.errors import StorageError
from converters.rows.pack import Runs, Slot, runs
from converters.tensors import DTYPE_BITS, Chunk, StoredTensor


@dataclass(frozen=True, slots=True)
class Region:
    """One entry of a (possibly stacked) tensor, and the rows of it that an atom takes.

    `index` picks the entry along the leading dimensions. The rest is a matrix of `rows` by `cols`:
    rows are the first remaining dimension. `transposed` stores columns first. `fold` views each row as that
    many shorter rows.
    """

    tensor: str
    index: tuple[int, ...]
    slot: Slot
    transposed: bool = False
    fold: int = 1


@dataclass(frozen=True, slots=True)
class Move:
    """All rows of one atom, from where the source keeps them to where the target does."""

    source: Region
    target: Region

    def runs(self) -> Runs:
        """Row runs of the move, sorted by target row."""
        return runs(self.source.slot, self.target.slot)


@dataclass(frozen=True, slots=True)
class Extent:
    """The stored part of a region's matrix that one chunk holds.

    Row `r` of the extent begins `start + r * pitch` bytes behind the chunk's first data byte; `cols` columns
    from `col` on are stored.
    """

    chunk: Chunk
    number: int
    row: int
    rows: int
    col: int
    cols: int
    start: int
    pitch: int


class Extents:
    """The extents of one entry, ordered by row then column; finds those that hold given rows."""

    __slots__ = ("_ends", "_rows", "items")

    def __init__(self, items: list[Extent]) -> None:
        self.items = sorted(items, key=lambda extent: (extent.row, extent.col))
        self._rows = [extent.row for extent in self.items]
        # The furthest row any extent so far reaches: monotone, so that it can be bisected where chunks are uneven.
        self._ends = list(accumulate((extent.row + extent.rows for extent in self.items), max))

    def overlap(self, row: int, rows: int) -> Iterator[tuple[Extent, int, int]]:
        """Parts of `[row, row + rows)` that each extent holds: (extent, first row, number of rows)."""
        for at in range(bisect_right(self._ends, row), bisect_left(self._rows, row + rows)):
            extent = self.items[at]
            first, last = max(row, extent.row), min(row + rows, extent.row + extent.rows)
            if first < last:
                yield extent, first, last - first


class TensorGrid:
    """Finds the chunks of a stored tensor that hold one entry of its leading dimensions."""

    def __init__(self, tensor: StoredTensor, depth: int) -> None:
        self.tensor = tensor
        self._holding: dict[tuple[int, ...], list[int]] = {}
        for number, chunk in enumerate(tensor.chunks):
            spans = (
                range(first, first + size)
                for first, size in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
            )
            for index in product(*spans):
                self._holding.setdefault(index, []).append(number)

    def holding(self, index: tuple[int, ...]) -> Sequence[int]:
        """Numbers of the chunks that hold some of the entry at `index`."""
        return self._holding.get(index, ())

    def extents(self, index: tuple[int, ...], fold: int = 1) -> Extents:
        """Extents of the matrix at `index`.

        Raises StorageError where a chunk cuts a dimension behind the columns.
        """
        return Extents([self._extent(number, index, fold) for number in self.holding(index)])

    def _extent(self, number: int, index: tuple[int, ...], fold: int) -> Extent:
        chunk, shape = self.tensor.chunks[number], self.tensor.shape
        depth = len(index)
        offsets, sizes, whole = chunk.offsets[depth:], chunk.sizes[depth:], shape[depth:]
        item = DTYPE_BITS[self.tensor.dtype] // 8
        inner = math.prod(whole[2:])
        if sizes[2:] != whole[2:]:
            raise StorageError(f"{chunk.file}: `{self.tensor.name}` is cut along dimension {depth + 2} or later")
        row, rows = (offsets[0], sizes[0]) if whole else (0, 1)
        col, cols = (offsets[1] * inner, sizes[1] * inner) if len(whole) > 1 else (0, 1)
        entry = 0
        for at, first, size in zip(index, chunk.offsets, chunk.sizes, strict=False):
            entry = entry * size + (at - first)
        start = entry * rows * cols * item
        if fold > 1:
            if len(whole) < 2 or sizes[1] != whole[1] or cols % fold:
                raise StorageError(
                    f"{chunk.file}: `{self.tensor.name}` cannot be cut by columns for this architecture"
                )
            row, rows, cols = row * fold, rows * fold, cols // fold
        return Extent(chunk, number, row, rows, col, cols, start, cols * item)


def matrix(shape: tuple[int, ...], depth: int, fold: int = 1) -> tuple[int, int]:
    """Rows and columns of one entry of a tensor whose first `depth` dimensions are a stack."""
    rest = shape[depth:]
    rows = rest[0] if rest else 1
    return rows * fold, math.prod(rest[1:]) // fold
