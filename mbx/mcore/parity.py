"""The forward leg of parity: one set of prompts through Transformers and through a loaded Megatron Core model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import UsageError
from converters.expr import Value
from converters.isos import inexpressible_rope
from mbx.mcore.forward import LogitDiff
from mbx.mcore.prompts import Batch, Passes, Prompts, passes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

#: Largest difference of two fp32 logits that rounding explains on models of a few layers.
FORWARD_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward comparison found: the difference, where it was taken, and what Megatron Core was lent for it.

    `lent`: rotary constants that Megatron Core cannot express and that were set from Transformers, one line each.
    """

    diff: LogitDiff
    where: str
    lent: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The figures, each with its unit, limit and reduction."""
        diff = self.diff
        kl = "is not finite" if diff.has_nan else f"{max(diff.kl, 0.0):.1e} nats (mean over positions)"
        return f"max |Δlogit| {diff.max_abs:.2e} (limit {diff.tolerance:g}), KL {kl}, top-1 {diff.top1_agreement:.2%}"

    @property
    def details(self) -> tuple[str, ...]:
        """Where the figures were taken, where they first passed the limit, and what was lent."""
        lines = [f"KL(Transformers ‖ Megatron Core) over {self.diff.num_positions} positions: {self.where}"]
        if self.diff.first_bad_position is not None:
            lines.append(f"the first position over the limit is number {self.diff.first_bad_position[1]}, from 0")
        return (*lines, *(f"{line}: Transformers' own frequencies were used" for line in self.lent))


def read_prompts(
    prompts: Prompts, config: Mapping[str, Value], hf_path: Path, hf_config: Mapping[str, Value]
) -> Passes:
    """`prompts` as passes for the model of `config`; raises what `mbx.mcore.prompts.passes` raises."""
    longest = config.get("model.max_sequence_length")
    return passes(
        prompts,
        hf_path,
        hf_config,
        vocab_size=vocab_size(config),
        max_length=longest if isinstance(longest, int) else None,
    )


def compare_forward(
    config: Mapping[str, Value],
    hf_path: Path,
    iteration: Path,
    hf_config: Mapping[str, Value],
    read: Passes,
    *,
    padded_vocab: int | None = None,
    device: str = "cpu",
    tolerance: float = FORWARD_TOLERANCE,
) -> Forward:
    """Difference of fp32 logits at every position of `read`.

    `config` is the Megatron Core config; `hf_config` the folder's in the v4 spelling; `iteration` a torch_dist
    folder, loaded by Megatron Core itself at its default strictness. `padded_vocab` is the embedding's row count
    there. On `cuda` both models run on the GPU, Megatron Core with Transformer Engine. Raises UnsupportedError where
    one of the two cannot run the model on this device, DeviceError where the device is missing.
    """
    from mbx.mcore.device import megatron_on
    from mbx.mcore.forward import compare_logits
    from mbx.mcore.reference import load_transformers

    vocab = vocab_size(config)
    with megatron_on(device):
        model = loaded_model(config, iteration, padded_vocab=padded_vocab, device=device)
        lent = lend_frequencies(model, hf_path, hf_config)
        ours = mcore_passes(model, read.batches, vocab)
        del model
        reference = transformers_passes(load_transformers(hf_path, device=device), read.batches)
    spec = "Transformer Engine" if device == "cuda" else "local"
    diff = compare_logits(reference, ours, tolerance=tolerance)
    return Forward(diff, f"{read.origin}; fp32 on {device}, {spec} spec", lent)


def loaded_model(
    config: Mapping[str, Value],
    iteration: Path,
    *,
    padded_vocab: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> nn.Module:
    """Build the model of `config` on `device` and load `iteration` into it; call inside `megatron_on(device)`."""
    from mbx.mcore.build import build_model
    from mbx.mcore.load import load_torch_dist

    model = build_model(
        dict(config), padded_vocab_size=padded_vocab, device=device, dtype=dtype, use_te=device == "cuda"
    )
    load_torch_dist(model, iteration)
    return model


def lend_frequencies(model: nn.Module, hf_path: Path, hf_config: Mapping[str, Value]) -> tuple[str, ...]:
    """Give `model` Transformers' rotary frequencies where Megatron Core's constants differ; returns what differed."""
    from mbx.mcore.forward import set_rope_frequencies
    from mbx.mcore.reference import transformers_frequencies

    lent = tuple(inexpressible_rope(hf_config))
    if lent:
        set_rope_frequencies(model, transformers_frequencies(hf_path))
    return lent


def mcore_passes(model: nn.Module, batches: tuple[Batch, ...], vocab: int) -> torch.Tensor:
    """Logits of every position of every batch in turn: [1, positions, vocab], on the CPU."""
    from mbx.mcore.forward import mcore_logits

    return _joined([mcore_logits(model, b.ids, vocab_size=vocab, positions=b.positions) for b in batches])


def transformers_passes(model: PreTrainedModel, batches: tuple[Batch, ...]) -> torch.Tensor:
    """The same of a Transformers model."""
    from mbx.mcore.reference import transformers_logits

    return _joined([transformers_logits(model, b.ids, positions=b.positions) for b in batches])


def _joined(logits: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([part.reshape(-1, part.shape[-1]).cpu() for part in logits])[None]


def vocab_size(config: Mapping[str, Value]) -> int:
    """The true vocabulary size of a Megatron Core config; UsageError where it has none."""
    vocab = config.get("model.vocab_size")
    if not isinstance(vocab, int):
        raise UsageError(f"model.vocab_size is {vocab!r}; forward parity needs a number")
    return vocab
