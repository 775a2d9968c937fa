"""Boxes of a whole tensor, stack and all, with the rank that saves each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

from converters.engine.plan import Draft
from converters.engine.regions import matrix
from converters.mcore.keys import parse_key
from converters.mcore.layout import Box, Layout, RankMap, boxes
from converters.rows.ops import Form
from converters.tensors import Shape

#: Rank, offsets and sizes of a box.
Placed = tuple[int, Shape, Shape]


@dataclass(slots=True)
class Target:
    """A tensor that rows fill entry by entry: `shape` is that of one, in leading dimensions `stack`.

    `form` says how tensor parallelism cuts an entry.
    """

    dtype: str
    stack: Shape
    shape: Shape
    form: Form
    entries: set[Shape] = field(default_factory=set)

    @property
    def gaps(self) -> int:
        """Entries of the stack that are not filled."""
        return math.prod(self.stack) - len(self.entries)

    def draft(self, key: str, layout: Layout, ranks: RankMap) -> Draft:
        """The tensor under `layout`, a box an entry and shard."""
        placed = place_boxes(key, self.shape, self.stack, self.form, layout, ranks, sorted(self.entries))
        return Draft(key, self.dtype, (*self.stack, *self.shape), placed)


def place_boxes(
    key: str,
    shape: Shape,
    stack: Shape,
    form: Form,
    layout: Layout,
    ranks: RankMap,
    indices: Iterable[Shape] | None = None,
) -> tuple[Placed, ...]:
    """Boxes of the tensor `key`, one per entry of its stack and shard; `shape` is that of one entry.

    LayoutError where the cut does not come out even.
    """
    parsed = parse_key(key)
    rows, cols = matrix(shape, 0)
    grid = [
        (box.rank, *in_dimensions(shape, box))
        for box in boxes(key, form, rows, cols, layout.expert_tp if parsed.experts else layout.tp)
    ]
    ones = (1,) * len(stack)
    out = []
    for index in product(*map(range, stack)) if indices is None else indices:
        layer, expert = parsed.at(index) if len(index) == parsed.depth else (parsed.layer, None)
        for shard, offsets, sizes in grid:
            rank = ranks.rank(key, layer, expert, shard)
            out.append((rank, (*index, *offsets), (*ones, *sizes)))
    return tuple(out)


def in_dimensions(shape: Shape, box: Box) -> tuple[Shape, Shape]:
    """Offsets and sizes of a matrix box in the dimensions of `shape`; columns are cut in the second one."""
    if not shape:
        return (), ()
    if len(shape) == 1:
        return (box.row,), (box.rows,)
    inner = math.prod(shape[2:])
    return (box.row, box.col // inner, *(0 for _ in shape[2:])), (box.rows, box.cols // inner, *shape[2:])
