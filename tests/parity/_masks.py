"""Whole models of Transformers with parts masked by hand: what a pruned model has to compute."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from converters.pruning.choosing import Importance
from converters.pruning.kept import WIDTHS, Kept, Spot
from mbx.tables import table_for

IDS = torch.arange(3, 51).reshape(2, 24)


def whole(folder: Path) -> Any:
    """The model of a folder, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def fields_of(folder: Path) -> dict[str, Any]:
    """A folder's config as Megatron Core fields."""
    config = json.loads((folder / "config.json").read_bytes())
    return table_for(config, None).config.to_mcore(config)


def drawn_importance(fields: Mapping[str, Any], seed: int = 0) -> Importance:
    """Importance of every part of a model, drawn: no two alike, no order that a slip keeps."""
    draw = np.random.default_rng(seed).random
    widths: dict[str, dict[Spot, Any]] = {"hidden_size": {(None, None): draw(fields["hidden_size"])}}
    layers = range(fields["num_layers"])
    for width in WIDTHS.keys() - {"hidden_size", "num_query_groups"}:
        if count := fields.get(width):
            experts = range(fields["num_moe_experts"]) if width == "moe_ffn_hidden_size" else [None]
            widths[width] = {(layer, expert): draw(count) for layer in layers for expert in experts}
    return Importance(draw(len(layers)), widths)


@torch.no_grad()
def mask(model: Any, kept: Kept) -> Any:
    """`model` with all masked that `kept` leaves out: zeros where it is written or read, norms over the rest."""
    decoder, config = model.model, model.config
    for number, layer in enumerate(decoder.layers):
        heads, groups = (kept.of(width, number) for width in ("num_attention_heads", "num_query_groups"))
        read = layer.self_attn.o_proj.weight.view(config.hidden_size, config.num_attention_heads, -1)
        if heads is not None:
            read[:, _others(heads, config.num_attention_heads)] = 0
        if groups is not None:
            shared = read.unflatten(1, (config.num_key_value_heads, -1))
            shared[:, _others(groups, config.num_key_value_heads)] = 0
        if (channels := kept.of("ffn_hidden_size", number)) is not None:
            layer.mlp.down_proj.weight[:, _others(channels, config.intermediate_size)] = 0
        if "moe_ffn_hidden_size" in kept.widths:
            for expert, down in enumerate(layer.mlp.experts.down_proj):
                down[:, _others(kept.of("moe_ffn_hidden_size", number, expert), config.moe_intermediate_size)] = 0
        if (experts := kept.of("num_moe_experts", number)) is not None:
            layer.mlp.gate.forward = _router_without(layer.mlp.gate, _others(experts, config.num_experts))
    if (channels := kept.of("hidden_size", None)) is not None:
        _mask_hidden(model, torch.from_numpy(channels))
    decoder.layers = nn.ModuleList(decoder.layers[number] for number in kept.layers)
    return model


def _others(stay: np.ndarray | None, count: int) -> list[int]:
    assert stay is not None
    return sorted(set(range(count)) - set(stay.tolist()))


def _router_without(router: Any, left_out: list[int]) -> Any:
    """Qwen3-MoE's router, to which some experts do not count."""

    def forward(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = nn.functional.linear(states.reshape(-1, states.shape[-1]), router.weight)
        scores[:, left_out] = -torch.inf
        weights, chosen = scores.softmax(-1, dtype=torch.float).topk(router.top_k)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return scores, weights, chosen

    return forward


def _mask_hidden(model: Any, channels: torch.Tensor) -> None:
    gone = torch.ones(model.config.hidden_size, dtype=torch.bool)
    gone[channels] = False
    model.model.embed_tokens.weight[:, gone] = 0
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "mlp.down_proj")):
            module.weight[gone] = 0
        elif name.endswith("mlp.experts"):
            module.down_proj[:, gone] = 0
        elif name.endswith(("layernorm", "model.norm")):
            module.forward = _norm_of(module, len(channels))


def _norm_of(norm: Any, count: int) -> Any:
    """RMSNorm over `count` channels, the others being zero."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        variance = states.pow(2).sum(-1, keepdim=True) / count
        return norm.weight * states * torch.rsqrt(variance + norm.variance_epsilon)

    return forward


@torch.no_grad()
def silence(folder: Path, kept: Kept, outputs: Mapping[str, str]) -> Any:
    """The model of a folder whose products out of heads and MLPs read zeros of what `kept` leaves out.

    `outputs` are these products by the width that they read: modules of a layer, or a parameter of all experts.
    """
    model = whole(folder)
    fields = fields_of(folder)
    for name, parameter in model.named_parameters():
        found = re.search(r"\.layers\.(\d+)\.", name)
        width = next((width for width, end in outputs.items() if name.endswith(end)), None)
        if found is None or width is None:
            continue
        layer, count = int(found[1]), fields[width]
        for expert, matrix in enumerate(parameter if parameter.dim() == 3 else parameter[None]):
            stay = kept.of(width, layer, expert if parameter.dim() == 3 else None)
            rows = matrix if matrix.shape[1] != fields["hidden_size"] or width == "num_attention_heads" else matrix.T
            rows.unflatten(1, (count, -1))[:, _others(stay, count)] = 0
    return model
