"""The loss leg of parity: what Transformers and Megatron Core each call the loss of one fixed batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import DifferenceError
from converters.expr import Value
from mbx.mcore.prompts import Passes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

#: Largest difference of two fp32 losses, in nats, that rounding explains.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean next-token cross entropy in nats over `num_tokens` predicted tokens, by each library's own code.

    `padded` is Megatron Core's own where the embedding has `padding` rows behind the vocabulary: its softmax runs over
    them too, and training starts from it. `mcore` is then taken from its logits over the true vocabulary.
    """

    transformers: float
    mcore: float
    num_tokens: int
    tolerance: float
    padding: int = 0
    padded: float | None = None

    @property
    def ok(self) -> bool:
        """True only where both are finite and agree within `tolerance`."""
        return math.isfinite(self.transformers) and abs(self.transformers - self.mcore) <= self.tolerance

    @property
    def summary(self) -> str:
        """Both figures and their limit."""
        return (
            f"Transformers {self.transformers:.6f}, Megatron Core {self.mcore:.6f} nats (mean over {self.num_tokens} "
            f"tokens), |Δ| {abs(self.transformers - self.mcore):.1e} (limit {self.tolerance:g})"
        )

    @property
    def details(self) -> tuple[str, ...]:
        """What padding does to the loss that training shows."""
        if self.padded is None:
            return ()
        return (
            f"training shows {self.padded:.6f}: Megatron Core's softmax also runs over {self.padding} padding rows",
        )


def compare_loss(
    config: Mapping[str, Value],
    hf_path: Path,
    iteration: Path,
    hf_config: Mapping[str, Value],
    read: Passes,
    *,
    padded_vocab: int | None = None,
    device: str = "cpu",
    tolerance: float = LOSS_TOLERANCE,
) -> Losses:
    """Losses of the first pass of `read`; arguments and errors are those of `mbx.mcore.parity.compare_forward`.

    DifferenceError where the batch predicts no token.
    """
    from mbx.mcore.device import megatron_on
    from mbx.mcore.parity import lend_frequencies, loaded_model, vocab_size
    from mbx.mcore.reference import load_transformers

    ids = read.batches[0].ids
    if ids.shape[1] < 2:
        raise DifferenceError(f"a batch of {list(ids.shape)} tokens predicts nothing: no loss to compare")
    with megatron_on(device):
        model = loaded_model(config, iteration, padded_vocab=padded_vocab, device=device)
        lend_frequencies(model, hf_path, hf_config)
        ours, padded = _mcore_loss(model, ids), None
        padding = 0 if padded_vocab is None else padded_vocab - vocab_size(config)
        if padding > 0:
            ours, padded = _trimmed_loss(model, ids, vocab_size(config)), ours
        del model
        theirs = _transformers_loss(load_transformers(hf_path, device=device), ids)
    return Losses(theirs, ours, ids.numel() - len(ids), tolerance, padding, padded)


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
