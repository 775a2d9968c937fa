"""Attention of models whose windowed layers are of another kind than the full ones: other heads, another rotation.

Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.layers import ModuleSpec, SelfAttention, is_layer_window_attention
from mbx.models.megatron.core.rotary import RotaryEmbedding
from mbx.models.megatron.local_modules import NarrowDotProductAttention


@dataclass(frozen=True, slots=True)
class Kinds:
    """What sets attention apart from Megatron Core's; this, if nothing is said.

    Windowed layers rotate by `rotary_base`, a share `rotary_percent` of each head, and have the TransformerConfig
    fields `windowed` in place of the others. Values of every layer are `v_head_dim` wide and come times `value_scale`.
    Under `gate_by_head` what gates a layer's output is one number a head, that of its first channel.
    """

    rotary_base: float | None = None
    rotary_percent: float = 1.0
    windowed: Mapping[str, Value] = field(default_factory=dict)
    v_head_dim: int | None = None
    value_scale: float | None = None
    gate_by_head: bool = False


class KindAttention(SelfAttention):  # type: ignore[misc]  # megatron is untyped
    """Self-attention of a layer by its kind (Gemma 3: windowed layers rotate by base 10000, full ones by 1000000)."""

    def __init__(
        self, config: TransformerConfig, submodules: Any, *, layer_number: int, kinds: Kinds, **keywords: Any
    ) -> None:
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        config = copy(config)
        if windowed and getattr(config, "yarn_rotary_scaling_factor", None):
            # these layers are not scaled (OLMo 3), and YaRN's factor on the tables is taken from here, once or always
            config.yarn_rotary_scaling_factor = 1.0
        for name, value in kinds.windowed.items() if windowed else ():
            setattr(config, name, value)
        if kinds.v_head_dim is not None:
            submodules = _narrow(submodules, config, kinds.v_head_dim)
        super().__init__(config, submodules, layer_number=layer_number, **keywords)
        self.value_width, self.value_scale = kinds.v_head_dim or config.kv_channels, kinds.value_scale
        if self.value_width != config.kv_channels and self.world_size > config.num_query_groups:
            raise UnsupportedError("values of their own width are built where ranks do not share keys and values")
        self.gate_by_head = kinds.gate_by_head and config.attention_output_gate
        self.window_rotary: RotaryEmbedding | None = None
        if windowed and kinds.rotary_base is not None:
            self.window_rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=kinds.rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=kinds.rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[torch.Tensor, ...]:
        """[s, b, hidden] → queries [s, b, heads, d], keys [s, b, groups, d], values [s, b, groups, v]"""
        key_width = self.hidden_size_per_attention_head
        if self.value_width == key_width:
            query, key, value, *rest = super().get_query_key_value_tensors(hidden_states, *arguments, **keywords)
        else:
            mixed, _ = self.linear_qkv(hidden_states)
            groups = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
            in_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
            query, key, value = groups.split([in_group * key_width, key_width, self.value_width], dim=-1)
            query, rest = query.reshape(*query.shape[:2], -1, key_width), []
        return query, key, value if self.value_scale is None else value * self.value_scale, *rest

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x: [s, b, heads · d], gate: [s, b, heads, d] → x, gated."""
        gated: torch.Tensor = super()._apply_output_gate(
            x, gate[..., :1].expand_as(gate) if self.gate_by_head else gate
        )
        return gated

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, object]:
        """As SelfAttention's; of rows that are one gate the first alone is trained, the others are made like it."""
        weight = self.linear_qkv.weight
        if self.gate_by_head and weight.numel():
            in_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
            shape = (-1, 2 * in_group + 2, self.hidden_size_per_attention_head, weight.shape[-1])
            with torch.no_grad():
                gates = weight.view(shape)[:, in_group : 2 * in_group]
                gates.copy_(gates[:, :, :1].expand_as(gates).clone())
        made: dict[str, object] = super().sharded_state_dict(*arguments, **keywords)
        return made

    def forward(self, *arguments: Any, rotary_pos_emb: torch.Tensor | None = None, **keywords: Any) -> Any:
        """As SelfAttention's; `rotary_pos_emb: [s / cp, 1, 1, d]` is replaced in a windowed layer."""
        if self.window_rotary is not None and rotary_pos_emb is not None:
            length = rotary_pos_emb.shape[0] * self.pg_collection.cp.size()
            rotary_pos_emb = self.window_rotary(length, packed_seq=keywords.get("packed_seq_params") is not None)
        return super().forward(*arguments, rotary_pos_emb=rotary_pos_emb, **keywords)


def _narrow(submodules: Any, config: TransformerConfig, value_width: int) -> Any:
    """The modules of an attention whose values are `value_width` wide."""
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    own = copy(submodules)
    own.linear_qkv = sized(own.linear_qkv, outputs=heads * width + groups * (width + value_width))
    own.linear_proj = sized(own.linear_proj, inputs=heads * value_width)
    core = own.core_attention
    local = core.__name__ in ("DotProductAttention", "LatentDotProductAttention")
    own.core_attention = _with_value_width(NarrowDotProductAttention if local else core, width, value_width)
    return own


def sized(linear: type[nn.Module], inputs: int | None = None, outputs: int | None = None) -> type:
    """What builds `linear` in other sizes than it is asked for; a class, for which a spec takes no function."""

    class Sized:
        def __new__(cls, input_size: int, output_size: int, **keywords: Any) -> nn.Module:  # type: ignore[misc]
            return linear(inputs or input_size, outputs or output_size, **keywords)

    return Sized


def _with_value_width(core: type[nn.Module], key_width: int, value_width: int) -> type:
    """What builds the attention proper for keys and values of their own widths."""

    class Core:
        def __new__(cls, **keywords: Any) -> nn.Module:  # type: ignore[misc]
            return core(**keywords, k_channels=key_width, v_channels=value_width)

    return Core


def attend_by_kind(
    layer: ModuleSpec, kinds: Kinds, module: type[KindAttention] = KindAttention, **more: object
) -> None:
    """Make `layer` attend by `module`, which takes `more`; UnsupportedError where it attends not by SelfAttention."""
    attention = layer.submodules.self_attention
    if attention.module is not SelfAttention:
        raise UnsupportedError(f"layers of two kinds are built for SelfAttention, not for {attention.module.__name__}")
    attention.module = module
    attention.params = {**(attention.params or {}), "kinds": kinds, **more}
