"""A plan as boxes: which part of which target tensor each stored chunk of a source holds, element for element.

Where an engine streams whole tensors past one place, boxes let those who hold the chunks act for themselves: a rank of
a running model knows by them, and by nothing else, what it has of every target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from converters.engine.plan import Draft, Plan
from converters.engine.regions import Extent, Region, TensorGrid
from converters.errors import CoverageError, UnsupportedError
from converters.rows.pack import Slot, runs
from converters.tensors import Shape

#: A slice of each dimension; every one has a start, a stop and a step.
Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Elements of the target `tensor` that chunk number `chunk` of the source `source` holds.

    `index` picks them from the target, `held` from the chunk's own array, of its `sizes`: dimensions that stack
    entries by a number, all others by slices. What `held` picks is a matrix the other way round where `transposed`.
    `shift` is added to every value on the way to the target.
    """

    tensor: str
    index: Index
    source: str
    chunk: int
    held: tuple[int | slice, ...]
    transposed: bool = False
    shift: int = 0

    @property
    def shape(self) -> Shape:
        """Sizes of the box in the target."""
        return sizes_of(self.index)


def sizes_of(index: Index) -> Shape:
    """How many elements of each dimension an index picks."""
    return tuple(len(range(part.start, part.stop, part.step)) for part in index)


def boxes_of(plan: Plan) -> Iterator[Box]:
    """Every box of a plan, in the order of its units.

    Raises UnsupportedError where values are not only moved and shifted (codecs, adapters), and for rows that no slices
    pick.
    """
    if plan.encoded or plan.reencoded or plan.updates:
        raise UnsupportedError("a plan that decodes, encodes or merges has no boxes: its values are computed")
    drafts = {draft.name: draft for draft in plan.drafts}
    grids: dict[tuple[str, int], TensorGrid] = {}
    for unit in plan.units:
        for move in unit.moves:
            source, key = move.source, (move.source.tensor, len(move.source.index))
            grid = grids.get(key) or grids.setdefault(key, TensorGrid(plan.sources[source.tensor], len(source.index)))
            extents = grid.extents(source.index, source.fold).items
            if source.transposed:  # its columns are the rows that move
                extents = [replace(e, row=e.col, rows=e.cols, col=e.row, cols=e.rows) for e in extents]
            for strip in strips(source.slot, move.target.slot):
                for extent in extents:
                    first, last = strip.within(extent)
                    if first < last:
                        cut = strip.cut(first, last)
                        index = _index(drafts[move.target.tensor], move.target, cut, extent)
                        held = _held(extent, source, cut)
                        flipped = source.transposed != move.target.transposed
                        yield Box(move.target.tensor, index, source.tensor, extent.number, held, flipped, unit.shift)


def check_cover(plan: Plan, boxes: Mapping[str, list[Box]]) -> None:
    """CoverageError unless the boxes of every target hold each of its elements once."""
    for draft in plan.drafts:
        held = sum(math.prod(box.shape) for box in boxes.get(draft.name, ()))
        if held != math.prod(draft.shape):
            raise CoverageError(f"`{draft.name}`: {held} of {math.prod(draft.shape)} elements are held")


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows `source + i · source_step` of a source that become rows `target + i · target_step`, for `i < count`."""

    source: int
    target: int
    count: int
    source_step: int = 1
    target_step: int = 1

    def within(self, extent: Extent) -> tuple[int, int]:
        """The `i` of the rows that an extent holds, from the first to behind the last."""
        first = max(0, -(-(extent.row - self.source) // self.source_step))
        return first, min(self.count, -(-(extent.row + extent.rows - self.source) // self.source_step))

    def cut(self, first: int, last: int) -> Strip:
        """The rows from the `first` to before the `last` alone."""
        source, target = self.source + first * self.source_step, self.target + first * self.target_step
        return Strip(source, target, last - first, self.source_step, self.target_step)


@lru_cache(maxsize=4096)
def strips(source: Slot, target: Slot) -> tuple[Strip, ...]:
    """The runs of an atom from one slot to another; rows that lie singly and evenly on both sides in one strip."""
    found = runs(source, target)
    out: list[Strip] = []
    for at, into, length in zip(found.source.tolist(), found.target.tolist(), found.length.tolist(), strict=True):
        last = out[-1] if out else None
        if last is not None and length == 1 and _single(last):
            steps = at - last.source - (last.count - 1) * last.source_step
            target_steps = into - last.target - (last.count - 1) * last.target_step
            even = last.count == 1 or (steps, target_steps) == (last.source_step, last.target_step)
            if even and steps > 0 and target_steps > 0:
                out[-1] = Strip(last.source, last.target, last.count + 1, steps, target_steps)
                continue
        out.append(Strip(at, into, length))
    return tuple(out)


def _single(strip: Strip) -> bool:
    """Whether a strip is of rows that lie singly: of one, or of several with others between them."""
    return strip.count == 1 or (strip.source_step, strip.target_step) != (1, 1)


def _index(draft: Draft, region: Region, strip: Strip, extent: Extent) -> Index:
    """The rows of a strip and the columns of an extent as slices of the target."""
    depth = len(region.index)
    entry = draft.shape[depth:]
    whole = entry[::-1] if region.transposed else entry
    inner = _slices(whole, strip.target, strip.count, strip.target_step, extent.col, extent.cols, region.fold)
    stack = tuple(slice(at, at + 1, 1) for at in region.index)
    return (*stack, *(inner[::-1] if region.transposed else inner))


def _held(extent: Extent, region: Region, strip: Strip) -> tuple[int | slice, ...]:
    """The rows of a strip as what picks them from the chunk's own array."""
    depth = len(region.index)
    chunk = extent.chunk
    stack = tuple(at - first for at, first in zip(region.index, chunk.offsets, strict=False))
    own = chunk.sizes[depth:]
    shape = own[::-1] if region.transposed else own
    inner = _slices(shape, strip.source - extent.row, strip.count, strip.source_step, 0, extent.cols, region.fold)
    return (*stack, *(inner[::-1] if region.transposed else inner))


def _slices(shape: Shape, row: int, count: int, step: int, col: int, cols: int, fold: int) -> Index:
    """Rows (folded ones) and columns of a matrix as slices of the array of `shape` that it is."""
    if not shape:
        return ()
    if count > 1 and step % fold:
        raise UnsupportedError(f"rows {step} apart of a matrix seen as {fold} halves are of no one box")
    step = max(1, step // fold) if count > 1 else 1
    rows = slice(row // fold, row // fold + (count - 1) * step + 1, step)
    if len(shape) == 1:
        return (rows,)
    inner = math.prod(shape[2:])
    start = col + row % fold * (shape[1] * inner // fold)
    return rows, slice(start // inner, (start + cols) // inner, 1), *(slice(0, size, 1) for size in shape[2:])
