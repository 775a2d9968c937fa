"""How exactly fp32 can place a token far from 0, measured in the reference model of the same comparison.

An angle is position x frequency. A frequency is right to one unit in the last place at best (2^-24 to 2^-23 of it),
and two correct libraries differ by that much: they compute powers, quotients and scalings in another order or on
another device. Behind position 8192 the angles then differ by up to 1e-3, in every layer, whatever the weights are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mbx.models.forward.divergence import vocab_parts
from mbx.models.forward.logits import FarLimit, LogitDiff
from mbx.models.prompts import Passes

if TYPE_CHECKING:
    from mbx.models.forward.models import TransformersModel
    from mbx.models.trace import Trace


def with_far_limit(
    diff: LogitDiff, reference: TransformersModel, trace: Trace, read: Passes, vocab: int, device: str
) -> LogitDiff:
    """`diff` judged again where nothing but far positions is over the limit: there, it may not be below the floor.

    The floor is the largest |Δlogit| at the far positions of `trace` that one unit in the last place of the
    frequencies makes in `reference`, which runs its far passes once more. Rank 0 alone calls this.
    """
    far = read.far
    over = [number for number, largest in enumerate(diff.largest) if not largest <= diff.tolerance]
    if diff.has_nan or not over or not all(bool(far[number]) for number in over):
        return diff
    floor = _floor(reference, trace, read, vocab, device)
    start = min(int(batch.positions[batch.far].min()) for batch in read.batches if batch.positions is not None)
    limit = FarLimit(start, max(diff.tolerance, floor), floor)
    still = [number for number in over if diff.largest[number] > limit.tolerance]
    return replace(diff, far=limit, first_bad_position=(0, still[0]) if still else None)


def _floor(reference: TransformersModel, trace: Trace, read: Passes, vocab: int, device: str) -> float:
    import torch

    from mbx.models.transformers.tracing import trace_transformers

    again = tuple(batch for batch in read.batches if bool(batch.far.any()))
    nudged = trace_transformers(reference.path, again, device=device, nudged=True, reading=reference.reading)
    # Rows of the plain trace that belong to passes run again, and the far ones of those.
    run_again = torch.cat([torch.full((batch.ids.numel(),), bool(batch.far.any())) for batch in read.batches])
    rows = torch.cat([batch.far.expand_as(batch.ids).flatten() for batch in again])
    floor = 0.0
    for first, last in vocab_parts(trace.hidden, 0, vocab):
        plain, moved = trace.head(first, last)[run_again], nudged.head(first, last)
        floor = max(floor, float((plain[rows].double() - moved[rows].double()).abs().max()))
    nudged.close()
    return floor
