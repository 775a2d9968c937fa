"""How far bf16 moves the reference's logits, measured in the same run: where a most likely token is certain.

Two right libraries may name another most likely token where the best two logits are nearly equal. Where they are apart
by more than twice what the model's own precision changes (each of the two may move by that much), they may not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from converters.errors import UnsupportedError
from mbx.models.forward.divergence import border_diffs, vocab_parts
from mbx.models.forward.logits import Bf16Noise, LogitDiff
from mbx.models.prompts import Passes
from mbx.models.trace import Head, Trace

if TYPE_CHECKING:
    from mbx.models.forward.models import TransformersModel

#: An fp32 number has 16 bits more than a bf16 one.
_FP32_TO_BF16 = 2.0**-16
#: Two libraries sum in other orders, and errors of many sums add up: three times as much was seen on small models.
_MARGIN = 16.0
_MOST_EXPLAINED = 5e-5


def with_bf16_noise(
    diff: LogitDiff, reference: TransformersModel, trace: Trace, read: Passes, vocab: int, device: str
) -> tuple[LogitDiff, dict[str, float]]:
    """`diff` with its most likely tokens judged outside the noise of bf16, and what rounding in fp32 explains.

    The second is the relative difference of hidden states by border: what bf16 makes there, by the ratio of the two
    precisions, with a margin; at most `_MOST_EXPLAINED`, since a router that turns over in bf16 alone tells nothing.

    `reference` runs the passes at positions 0, 1, 2, … once more, in bf16; `trace` is its fp32 run of all passes.
    Nothing is measured where logits are not finite. Rank 0 alone calls this. UnsupportedError where torch cannot run
    the model in bf16.
    """
    import torch

    if diff.has_nan:
        return diff, {}
    from mbx.models.transformers.tracing import trace_transformers

    near = tuple(batch for batch in read.batches if batch.positions is None)
    try:
        rounded = trace_transformers(reference.path, near, device=device, dtype="bfloat16", reading=reference.reading)
    except RuntimeError as error:  # torch's word for two dtypes in one product, or a kernel that it has not
        raise UnsupportedError(f"Transformers cannot run `{reference.path}` in bf16: {error}") from error
    rows = torch.cat([torch.full((batch.ids.numel(),), batch.positions is None) for batch in read.batches])
    try:
        found = outside_noise(
            lambda first, last: trace.head(first, last)[rows],
            rounded.head,
            [number for number, row in enumerate(rows.nonzero().flatten().tolist()) if row in set(diff.other_top1)],
            vocab_parts(trace.hidden, 0, vocab),
        )
        near_states = Trace({name: states[rows] for name, states in trace.hidden.items()}, trace.head)
        explained = {
            border.name: min(_MOST_EXPLAINED, _MARGIN * border.relative * _FP32_TO_BF16)
            for border in border_diffs(near_states, rounded)
        }
    finally:
        rounded.close()
    return replace(diff, noise=found), explained


def outside_noise(exact: Head, rounded: Head, other_top1: list[int], parts: Iterable[tuple[int, int]]) -> Bf16Noise:
    """Positions whose best two logits of `exact` are apart by more than twice the largest |exact - rounded| there.

    Both heads give [positions, tokens]; `other_top1` numbers the positions at which the other side has another most
    likely token. `parts` are the ranges of the vocabulary to compare at a time, in order.
    """
    import torch

    best, noise = torch.empty(0), torch.empty(0)
    for first, last in parts:
        left, right = exact(first, last).double(), rounded(first, last).double()
        here = (left - right).abs().amax(-1)
        noise = torch.maximum(noise, here) if first else here
        both = torch.cat((best, left), dim=-1) if first else left
        best = both.topk(min(2, both.shape[-1]), dim=-1).values
    margin = best[:, 0] - best[:, -1]
    outside = margin > 2 * noise  # False where the noise is not a number
    wrong = [number for number in other_top1 if bool(outside[number])]
    return Bf16Noise(float(noise.max()), int(outside.sum()), outside.numel(), tuple(wrong))
