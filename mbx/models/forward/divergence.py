"""Where two forward passes part: the difference of hidden states at every layer's border, and of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import DifferenceError
from mbx.models.device import is_main
from mbx.models.forward.logits import LogitDiff, LogitTally
from mbx.models.trace import Trace

if TYPE_CHECKING:
    import torch

#: A border diverges where its relative difference passes this and is this many times that of the border before.
DIVERGES, JUMPS = 5e-6, 10.0
#: What was measured of rounding where nothing was.
_NOTHING: Mapping[str, float] = {}
#: Bytes of an fp32 part of the output layer.
_PART_BYTES = 1 << 27


@dataclass(frozen=True, slots=True)
class BorderDiff:
    """Hidden states of one border: over all positions, the largest |Δ| and ‖Δ‖ / ‖first side‖.

    Both are infinite where a value of either side is not finite.
    """

    name: str
    max_abs: float
    relative: float

    @property
    def line(self) -> str:
        """The difference in one line."""
        return f"{self.name}: max |Δ| {self.max_abs:.2e}, relative {self.relative:.1e}"


def border_diffs(a: Trace, b: Trace, rows: torch.Tensor | None = None) -> tuple[BorderDiff, ...]:
    """Differences at every border that both traces have, in the order of the model; of the positions `rows` alone.

    DifferenceError where the shapes differ: the sides did not see the same tokens.
    """
    found = []
    for name, left in a.hidden.items():
        right = b.hidden.get(name)
        if right is None:
            continue
        if left.shape != right.shape:
            raise DifferenceError(f"{name}: hidden states {list(left.shape)} against {list(right.shape)}")
        found.append(_diff(name, left, right) if rows is None else _diff(name, left[rows], right[rows]))
    return tuple(found)


def _diff(name: str, left: torch.Tensor, right: torch.Tensor) -> BorderDiff:
    difference = left.double() - right.double()
    if not bool(difference.isfinite().all()):
        return BorderDiff(name, math.inf, math.inf)
    norm = float(left.double().norm())
    change = float(difference.norm())
    relative = change / norm if norm else (0.0 if change == 0 else math.inf)
    return BorderDiff(name, float(difference.abs().max()), relative)


def first_divergence(borders: Sequence[BorderDiff], explained: Mapping[str, float] = _NOTHING) -> BorderDiff | None:
    """The first border whose difference jumps: rounding grows slowly through the layers, a defect at once.

    `explained` is the relative difference that rounding was measured to make behind a border; below it nothing jumps.
    """
    before = 0.0
    for border in borders:
        if not math.isfinite(border.relative):
            return border
        limit = max(DIVERGES, explained.get(border.name, 0.0))
        if border.relative > limit and border.relative > JUMPS * before:
            return border
        before = max(before, border.relative)
    return None


def vocab_parts(hidden: Mapping[str, torch.Tensor], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Tokens `[first, last)` in parts that the output layer is multiplied in, by the width of the states `hidden`.

    Collective in a process group: the ranks have to agree, and only rank 0 is sure to have states.
    """
    import torch

    width = next((states.shape[-1] for states in hidden.values()), 1)
    sizes = [max(1024, _PART_BYTES // (4 * width))]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(sizes, src=0)
    for start in range(first, last, sizes[0]):
        yield start, min(last, start + sizes[0])


def compare_traces(
    a: Trace, b: Trace, vocab: int, tolerance: float, *, relative: bool = False
) -> tuple[LogitDiff, tuple[BorderDiff, ...]] | None:
    """Logits of the whole vocabulary, a part at a time, and the hidden states.

    `tolerance` is a difference of two logits, or with `relative` a share of their spread. Collective where a head is;
    the result is rank 0's, None elsewhere.
    """
    tally = LogitTally(tolerance, relative=relative)
    for first, last in vocab_parts(a.hidden or b.hidden, 0, vocab):
        left, right = a.head(first, last), b.head(first, last)
        if is_main():
            tally.add(left, right)
    return (tally.result(), border_diffs(a, b)) if is_main() else None
