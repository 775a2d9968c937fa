"""Boxes of a whole tensor, stack and all, with the rank that saves each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from converters.engine.regions import matrix
from converters.mcore.keys import parse_key
from converters.mcore.layout import Box, Layout, RankMap, boxes
from converters.rows.ops import Form
from converters.tensors import Shape

#: Rank, offsets and sizes of a box.
Placed = tuple[int, Shape, Shape]


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
    inner = 1
    for extent in shape[2:]:
        inner *= extent
    return (box.row, box.col // inner, *(0 for _ in shape[2:])), (box.rows, box.cols // inner, *shape[2:])
