"""Layers of attention and Mamba-2 side by side, and an MLP, with a multiplier at every turn (Falcon-H1).

Megatron Core has no such layer; its own attention, mixer and MLP make one here, under Megatron-Bridge's names: `norm`,
`self_attention`, `mamba_mixer`, `mlp`. Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from converters.errors import UnsupportedError, UsageError
from mbx.models.megatron.config import FlatConfig, number
from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.hybrid import HybridStack, HybridStackSubmodules
from mbx.models.megatron.core.layers import ModuleSpec, SelfAttention, TransformerLayer, mlp_submodules, without_norm
from mbx.models.megatron.core.mamba import MambaMixer, MambaMixerSubmodules
from mbx.models.megatron.followed import follow
from mbx.models.megatron.hybrid_layers import LocalHybridStack
from mbx.models.megatron.specs import gpt_block_spec


@dataclass(frozen=True, slots=True)
class Scale:
    """Factors of a linear's outputs: each of `groups` repeats has `sizes` channels, which come times `factors`."""

    sizes: tuple[int, ...]
    factors: tuple[float, ...]
    groups: int = 1

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """output: [..., groups · Σ sizes] → the same"""
        if len(set(self.factors)) == 1:
            return output * self.factors[0]
        parts = torch.split(output.reshape(*output.shape[:-1], self.groups, -1), list(self.sizes), -1)
        return torch.cat([part * factor for part, factor in zip(parts, self.factors, strict=True)], -1).flatten(-2)


@dataclass(frozen=True, slots=True)
class Beside:
    """What sets a layer apart from one of attention and MLP (Transformers' `FalconH1Config` by its own words).

    `ssm` are factors of z, x, B, C and dt, `mlp` of the gate and of what comes out of the MLP; `rmsnorm`: a norm
    behind the mixer's gate.
    """

    rmsnorm: bool
    attention_in: float
    attention_out: float
    key: float
    ssm_in: float
    ssm_out: float
    ssm: tuple[float, ...]
    mlp: tuple[float, ...]


def beside_of(config: FlatConfig) -> Beside:
    """The same from a flat config.

    UsageError for a factor that is none, UnsupportedError for a norm before the gate.
    """
    rmsnorm = bool(config.get("rmsnorm"))
    if rmsnorm and config.get("norm_before_gate"):
        raise UnsupportedError(
            "Megatron Core's mixer has its norm behind the gate, `norm_before_gate` asks for before"
        )
    names = ("attention_in", "attention_out", "key", "ssm_in", "ssm_out")
    return Beside(
        rmsnorm,
        **{name: number(config, f"{name}_multiplier") or 1.0 for name in names},
        ssm=_factors(config, "ssm_multipliers", 5),
        mlp=_factors(config, "mlp_multipliers", 2),
    )


def _factors(config: FlatConfig, field: str, count: int) -> tuple[float, ...]:
    values = config.get(field)
    if values is None:
        return (1.0,) * count
    if not isinstance(values, list | tuple) or len(values) != count:
        raise UsageError(f"`{field}` must be {count} numbers above 0, got {values!r}")
    factors = [number({field: value}, field) for value in values]
    if None in factors:  # off is what a whole list can be
        raise UsageError(f"`{field}` must be {count} numbers above 0, got {values!r}")
    return tuple(factor for factor in factors if factor is not None)


class AttentionBesideMamba(SelfAttention):  # type: ignore[misc]  # megatron is untyped
    """Self-attention, and to what it gives is added what the layer's mixer makes of the same input.

    So the rest of Megatron Core's layer stays as it is, recomputation included. The mixer is the layer's module.
    """

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
        """[s, b, hidden] → [s, b, hidden]; no linear has a bias."""
        if keywords.get("inference_context") is not None:
            raise UnsupportedError("attention beside Mamba-2 keeps no states between calls")
        attended, _ = super().forward(hidden_states, *arguments, **keywords)
        mixed, _ = self.__dict__["mixer"](hidden_states, packed_seq_params=keywords.get("packed_seq_params"))
        return attended + mixed, None


class LayerBesideMamba(TransformerLayer):  # type: ignore[misc]  # megatron is untyped
    """x + attention(norm(x)) + mixer(norm(x)), then the MLP with a norm of its own; `parts` make the mixer."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int = 1,
        *,
        beside: Beside,
        parts: MambaMixerSubmodules,
        **keywords: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **keywords)
        self.mamba_mixer = MambaMixer(
            config,
            parts,
            config.hidden_size,
            rmsnorm=beside.rmsnorm,
            layer_number=self.layer_number,
            pg_collection=self.pg_collection,
        )
        self.self_attention.__dict__["mixer"] = self.mamba_mixer
        for linear, scale in self._scales(beside):
            if set(scale.factors) != {1.0}:
                follow(linear, scale)

    def _scales(self, beside: Beside) -> list[tuple[nn.Module, Scale]]:
        """Every linear and its factors; what multiplies an input multiplies the outputs, as there are no biases."""
        attention, mixer, mlp = self.self_attention, self.mamba_mixer, self.mlp
        width, groups = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
        queries = attention.num_attention_heads_per_partition // groups * width
        inner, state = mixer.d_inner_local_tp, mixer.ngroups_local_tp * mixer.d_state
        hidden, ffn = self.config.hidden_size, self.config.ffn_hidden_size // self.tp_group.size()
        qkv = tuple(beside.attention_in * factor for factor in (1.0, beside.key, 1.0))
        mixed = tuple(beside.ssm_in * factor for factor in beside.ssm)
        return [
            (attention.linear_qkv, Scale((queries, width, width), qkv, groups)),
            (attention.linear_proj, Scale((hidden,), (beside.attention_out,))),
            (mixer.in_proj, Scale((inner, inner, state, state, mixer.nheads_local_tp), mixed)),
            (mixer.out_proj, Scale((hidden,), (beside.ssm_out,))),
            (mlp.linear_fc1, Scale((ffn, ffn), (beside.mlp[0], 1.0))),
            (mlp.linear_fc2, Scale((hidden,), (beside.mlp[1],))),
        ]


def beside_mamba_spec(config: TransformerConfig, beside: Beside, *, use_te: bool) -> ModuleSpec:
    """The stack of a hybrid model whose layers of attention are `LayerBesideMamba`.

    UnsupportedError where ranks share keys and values, whose linear's channels lie otherwise.
    """
    if config.tensor_model_parallel_size > config.num_query_groups:
        raise UnsupportedError(
            f"attention beside Mamba-2 is built where ranks do not share keys and values: "
            f"{config.num_query_groups} groups, tp {config.tensor_model_parallel_size}"
        )
    block = gpt_block_spec(config, use_te=use_te)
    layer = block.layer_specs[0]
    submodules, mlp = layer.submodules, mlp_submodules(layer)
    attention = submodules.self_attention
    if attention.module is not SelfAttention or getattr(mlp, "linear_fc1", None) is None:
        raise UnsupportedError("attention beside Mamba-2 is built for SelfAttention and a dense MLP")
    attention.module = AttentionBesideMamba
    plain = attention.submodules.linear_qkv = without_norm(attention.submodules.linear_qkv)
    submodules.input_layernorm = block.layer_norm
    submodules.sharded_state_dict_keys_map = {**submodules.sharded_state_dict_keys_map, "input_layernorm.": "norm."}
    parts = MambaMixerSubmodules(in_proj=plain, out_proj=attention.submodules.linear_proj)
    layer.module, layer.params = LayerBesideMamba, {**(layer.params or {}), "beside": beside, "parts": parts}
    stack = HybridStack if use_te else LocalHybridStack
    return ModuleSpec(module=stack, submodules=HybridStackSubmodules(attention_layer=layer))
