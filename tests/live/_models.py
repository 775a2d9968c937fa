"""Live models of tiny families on the CPU, filled by Megatron Core itself from checkpoints that mbx converted."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import nn

from converters.mcore.layout import Layout
from converters.rows.expr import Value
from mbx.formats.hf import read_config
from mbx.formats.registry import open_megatron
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.weights import sharded_weights
from mbx.tables import table_for


def build(folder: Path, spread: Spread, **changes: Value) -> list[nn.Module]:
    """This rank's chunks, with random weights; `changes` are fields of Megatron Core's config."""
    config = read_config(folder)
    fields = {**table_for(config).config.to_mcore(config), **changes}
    padded = Layout(tp=spread.tp, vocab_divisor=1).padded_vocab(int(str(fields["model.vocab_size"])))
    stages = range(spread.vpp) if spread.vpp > 1 else (None,)
    te = spread.device == "cuda"
    return [build_model(fields, spread, use_te=te, padded_vocab_size=padded, vp_stage=stage) for stage in stages]


def fill(chunks: list[nn.Module], checkpoint: Path) -> None:
    """Load a torch_dist checkpoint as Megatron-LM does."""
    asked = {f"model{n}": sharded_weights(chunk) for n, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(asked, str(open_megatron(checkpoint).iteration))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"], strict=True)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def parameters(chunks: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {f"{n}.{k}": p.detach().clone() for n, chunk in enumerate(chunks) for k, p in chunk.named_parameters()}


def differing(before: dict[str, torch.Tensor], chunks: list[nn.Module]) -> list[str]:
    """Parameters of which a bit is not as it was."""
    now = {f"{n}.{k}": p.detach() for n, chunk in enumerate(chunks) for k, p in chunk.named_parameters()}
    return [name for name, value in before.items() if not same_bytes(value, now[name])]


def scramble(chunks: list[nn.Module]) -> None:
    """Other values in every parameter."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.uniform_(-3, 3)


__all__ = [
    "build",
    "differing",
    "fill",
    "parallel_state",
    "parameters",
    "read_folder",
    "same_bytes",
    "scramble",
]
