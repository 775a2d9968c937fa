"""The loss leg of parity: what each side's library calls the loss of one fixed batch."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import DifferenceError
from mbx.mcore.prompts import Passes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from mbx.mcore.parity import MegatronModel, Model

#: Largest difference of two fp32 losses, in nats, that rounding explains.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Loss:
    """One side's mean next-token cross entropy in nats, by its library's own code.

    `padded` is Megatron Core's own where the embedding has `padding` rows behind the vocabulary: its softmax runs over
    them too, and training starts from it. `value` is then taken from its logits over the true vocabulary.
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


def compare_loss(
    first: Model, second: Model, read: Passes, vocab: int, *, device: str = "cpu", tolerance: float = LOSS_TOLERANCE
) -> Losses:
    """Losses of the first pass of `read`, whole models in memory; errors are those of `compare_forward`.

    DifferenceError where the batch predicts no token.
    """
    from mbx.mcore.device import megatron_on
    from mbx.mcore.parity import MegatronModel
    from mbx.mcore.reference import load_transformers

    ids = read.batches[0].ids
    if ids.shape[1] < 2:
        raise DifferenceError(f"a batch of {list(ids.shape)} tokens predicts nothing: no loss to compare")
    models = (first, second)
    with contextlib.ExitStack() as stack:
        if any(isinstance(model, MegatronModel) for model in models):
            stack.enter_context(megatron_on(device))
        found = [
            _megatron(model, ids, vocab, device)
            if isinstance(model, MegatronModel)
            else Loss(model.title, _transformers_loss(load_transformers(model.path, device=device), ids))
            for model in models
        ]
    return Losses(found[0], found[1], ids.numel() - len(ids), tolerance)


def _megatron(model: MegatronModel, ids: torch.Tensor, vocab: int, device: str) -> Loss:
    from mbx.mcore.whole import filled_model

    built = filled_model(model, device)
    ours, padding = _mcore_loss(built, ids), model.embedded_rows - vocab
    if padding <= 0:
        return Loss(model.title, ours)
    return Loss(model.title, _trimmed_loss(built, ids, vocab), padding, ours)


def _mcore_loss(model: nn.Module, ids: torch.Tensor) -> float:
    """`ids: [b, s]` → mean over the [b, s - 1] tokens that have a successor."""
    import torch

    tokens = ids.to(next(model.parameters()).device)
    model.train(False)
    places = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    with torch.no_grad():
        losses = model(tokens[:, :-1].contiguous(), places, None, labels=tokens[:, 1:].contiguous())
    return float(losses.double().mean())


def _trimmed_loss(model: nn.Module, ids: torch.Tensor, vocab: int) -> float:
    """The same from the logits of the first `vocab` tokens."""
    import torch

    from mbx.mcore.forward import mcore_logits

    logits = mcore_logits(model, ids, vocab_size=vocab)[:, :-1].double().cpu()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().cpu()))


def _transformers_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    import torch

    tokens = ids.to(model.device)
    with torch.no_grad():
        return float(model(tokens, labels=tokens, use_cache=False).loss)
