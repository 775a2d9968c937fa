"""Whether boxes tile a tensor exactly: no hole, no overlap, any uneven grid."""

from __future__ import annotations

import math

from converters.tensors import Shape

#: Offsets and sizes of a box, in elements.
Box = tuple[Shape, Shape]

#: Boxes looked at, per box, before a layout is called too irregular to check. A layout cut `n` times in
#: nested turns costs `n` looks; one that a mesh of ranks writes costs as many as it has cut dims.
_LOOKS_PER_BOX = 200
_MAX_PAIRWISE = 64


def tiling_fault(shape: Shape, boxes: list[Box]) -> str | None:
    """What keeps non-empty `boxes`, each within `shape`, from tiling it; None when they do.

    Equal volume and no overlap make a tiling. Overlap is sought by cutting: boxes whose extents along a dim
    fall into separate intervals are compared only within their interval.
    """
    covered = sum(math.prod(sizes) for _, sizes in boxes)
    wanted = math.prod(shape)
    if covered != wanted:
        what = "leave a hole" if covered < wanted else "overlap"
        return f"its {len(boxes)} chunks {what}: they have {covered} elements, it has {wanted}"
    budget = _LOOKS_PER_BOX * max(len(boxes), 1)
    pending = [boxes]
    while pending:
        group = pending.pop()
        if len(group) == 1:
            continue
        parts = [group]
        for dim in range(len(shape)):
            budget -= len(group)
            parts = _separate(group, dim)
            if len(parts) > 1:
                break
        if len(parts) > 1:
            pending.extend(parts)
            continue
        if len(group) > _MAX_PAIRWISE and budget > 0:
            budget -= len(group) ** 2
        if budget <= 0:
            return f"its {len(boxes)} chunks lie too irregularly to be checked"
        for index, one in enumerate(group):
            for other in group[index + 1 :]:
                if _overlap(one, other):
                    return f"its chunks at {one[0]} and {other[0]} overlap"
    return None


def _separate(boxes: list[Box], dim: int) -> list[list[Box]]:
    """Boxes grouped so that the extents of different groups along `dim` do not meet."""
    ordered = sorted(boxes, key=lambda box: box[0][dim])
    parts: list[list[Box]] = []
    end = -1
    for box in ordered:
        start = box[0][dim]
        if start >= end or not parts:
            parts.append([])
            end = start
        parts[-1].append(box)
        end = max(end, start + box[1][dim])
    return parts


def _overlap(one: Box, other: Box) -> bool:
    return all(
        a < b + size_b and b < a + size_a
        for a, size_a, b, size_b in zip(one[0], one[1], other[0], other[1], strict=True)
    )
