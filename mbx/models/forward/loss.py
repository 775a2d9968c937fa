"""The loss leg of parity: each side's mean next-token cross entropy of one fixed batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbx.models.device import is_main
from mbx.models.forward.divergence import vocab_parts

if TYPE_CHECKING:
    import torch

    from mbx.models.forward.models import Model
    from mbx.models.prompts import Batch
    from mbx.models.trace import Trace

#: Largest difference of two fp32 losses, in nats, that rounding explains.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Loss:
    """One side's mean next-token cross entropy in nats, over the true vocabulary.

    `padded` is what training starts from where the embedding has `padding` rows behind the vocabulary: Megatron
    Core's softmax runs over them too.
    """

    title: str
    value: float
    padding: int = 0
    padded: float | None = None


@dataclass(frozen=True, slots=True)
class Losses:
    """Both sides' losses over `num_tokens` predicted tokens."""

    first: Loss
    second: Loss
    num_tokens: int
    tolerance: float

    @property
    def ok(self) -> bool:
        """True only where both are finite and agree within `tolerance`."""
        return math.isfinite(self.first.value) and abs(self.first.value - self.second.value) <= self.tolerance

    @property
    def summary(self) -> str:
        """Both figures and their limit."""
        a, b = self.first, self.second
        return (
            f"{a.title} {a.value:.6f}, {b.title} {b.value:.6f} nats (mean over {self.num_tokens} tokens), "
            f"|Δ| {abs(a.value - b.value):.1e} (limit {self.tolerance:g})"
        )

    @property
    def details(self) -> tuple[str, ...]:
        """What padding does to the loss that training shows."""
        return tuple(
            f"training shows {one.padded:.6f}: {one.title}'s softmax also runs over {one.padding} padding rows"
            for one in (self.first, self.second)
            if one.padded is not None
        )


def compare_losses(
    models: Sequence[Model], traces: Sequence[Trace], batch: Batch, vocab: int, tolerance: float = LOSS_TOLERANCE
) -> Losses | None:
    """Losses of `batch`, the first that the two `traces` saw; None where it predicts no token.

    Collective; rank 0 has the result, None elsewhere.
    """
    if batch.ids.shape[1] < 2:
        return None
    found = [_loss(model, trace, batch.ids, vocab) for model, trace in zip(models, traces, strict=True)]
    if not is_main():
        return None
    return Losses(found[0], found[1], batch.ids.numel() - len(batch.ids), tolerance)


def _loss(model: Model, trace: Trace, ids: torch.Tensor, vocab: int) -> Loss:
    entropy = CrossEntropy(ids)
    for first, last in vocab_parts(trace.hidden, 0, vocab):
        entropy.add(trace.head(first, last), first)
    value = entropy.mean()
    padding = model.padding(vocab)
    if not padding:
        return Loss(model.title, value)
    for first, last in vocab_parts(trace.hidden, vocab, vocab + padding):
        entropy.add(trace.head(first, last), first)
    return Loss(model.title, value, padding, entropy.mean())


class CrossEntropy:
    """Next-token cross entropy of `ids: [b, s]`, a part of the vocabulary at a time, in float64."""

    def __init__(self, ids: torch.Tensor) -> None:
        import torch

        rows = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
        self._rows, self._targets = rows, ids[:, 1:].flatten().cpu()
        self._log_sums = torch.full(rows.shape, -math.inf, dtype=torch.float64)
        self._chosen = torch.full(rows.shape, math.nan, dtype=torch.float64)

    def add(self, logits: torch.Tensor, first: int) -> None:
        """logits: [positions, tokens] from token `first` on; positions behind those of `ids` are not looked at.

        Nothing is added where there are no logits, as on ranks that have none.
        """
        import torch

        if not logits.numel():
            return
        mine = logits[self._rows].double()
        self._log_sums = torch.logaddexp(self._log_sums, mine.logsumexp(-1))
        here = ((self._targets >= first) & (self._targets < first + mine.shape[1])).nonzero().flatten()
        self._chosen[here] = mine[here, self._targets[here] - first]

    def mean(self) -> float:
        """The mean in nats; NaN where a predicted token got no logit."""
        return float((self._log_sums - self._chosen).mean())
