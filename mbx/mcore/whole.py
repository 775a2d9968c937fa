"""Whole models in memory: what the loss leg runs, and what the layer-by-layer passes are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.expr import Value
from converters.isos import inexpressible_rope
from mbx.mcore.prompts import Batch

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from mbx.mcore.parity import MegatronModel


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


def filled_model(model: MegatronModel, device: str = "cpu") -> nn.Module:
    """One side of a comparison as a whole model on `device`; call inside `megatron_on(device)`."""
    from mbx.io.files import FileSource
    from mbx.mcore.build import build_model
    from mbx.mcore.forward import set_rope_frequencies
    from mbx.mcore.load import load_torch_dist, refused, sharded_weights

    built = build_model(
        dict(model.config), padded_vocab_size=model.embedded_rows, device=device, use_te=device == "cuda"
    )
    if model.torch_dist:
        load_torch_dist(built, model.root)
    else:
        found = model.weights(FileSource(model.root)).fill(sharded_weights(built))
        missing, _ = built.load_state_dict(found, strict=False)
        if lacking := [name for name in missing if not name.endswith("_extra_state")]:
            raise refused(model.root, KeyError(f"it lacks {', '.join(lacking)}"))
    if (frequencies := model.frequencies) is not None:
        set_rope_frequencies(built, frequencies)
    return built


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
