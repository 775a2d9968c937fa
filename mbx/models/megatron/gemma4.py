"""What Gemma 4 has that no Megatron Core layer has: keys as values, keys of other layers, an input for each layer.

Formulas are those of Transformers' `Gemma4TextDecoderLayer` and `Gemma4TextModel`; parameters have the names that
Megatron-Bridge gives them. Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from converters.errors import UnsupportedError
from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.groups import mappings
from mbx.models.megatron.core.layers import (
    IdentityOp,
    ModuleSpec,
    TransformerLayer,
    VocabParallelEmbedding,
    holds_experts,
    is_layer_window_attention,
)
from mbx.models.megatron.core.sharding import ShardedTensor
from mbx.models.megatron.gemma4_experts import NORMS, Gemma4Experts
from mbx.models.megatron.layer_kinds import KindAttention, Kinds, attend_by_kind, sized
from mbx.models.megatron.local_modules import LocalNorm


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What layers take besides the output of the one before; nothing, if nothing is said.

    The `shared` last ones take keys and values of the last layer before them that is of their kind, and have an MLP of
    twice the width where `wide`. Where `keys_as_values`, values of full layers are their keys before the norm. Every
    layer gets a vector of `width` for each token from a table of `vocab` rows.
    """

    shared: int = 0
    wide: bool = False
    keys_as_values: bool = False
    width: int = 0
    vocab: int = 0


class Gemma4Attention(KindAttention):
    """Attention whose values have a norm without a weight; keys and values are kept for layers that `shares` them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        *,
        layer_number: int,
        kinds: Kinds,
        inputs: LayerInputs,
        **keywords: Any,
    ) -> None:
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        shares = layer_number > config.num_layers - inputs.shared
        if shares:
            submodules, own = copy(submodules), {**(kinds.windowed if windowed else {})}
            width = cast("int", own.get("kv_channels", config.kv_channels))
            submodules.linear_qkv = sized(submodules.linear_qkv, outputs=config.num_attention_heads * width)
            submodules.k_layernorm = IdentityOp  # Core 0.19 takes none for its own
        super().__init__(config, submodules, layer_number=layer_number, kinds=kinds, **keywords)
        if self.world_size > self.config.num_query_groups:
            raise UnsupportedError("Gemma 4's attention is built where ranks do not share keys and values")
        self.windowed, self.shares = windowed, shares
        self.keys_as_values = inputs.keys_as_values and not windowed
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def take_from(self, source: Gemma4Attention) -> None:
        """Take keys and values of `source` from now on."""
        self.__dict__["source"] = source

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[torch.Tensor, ...]:
        """[s, b, hidden] → queries [s, b, heads, d], keys and values [s, b, groups, d]"""
        mixed, _ = self.linear_qkv(hidden_states)
        width = self.hidden_size_per_attention_head
        if self.shares:
            key, value = self.__dict__["source"].kept
            return self.q_layernorm(mixed.unflatten(-1, (-1, width))), key, value
        in_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        groups = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        query, key, value = groups.split([in_group * width, width, width], dim=-1)
        value = nn.functional.rms_norm((key if self.keys_as_values else value).float(), (width,), None, self._epsilon)
        query = self.q_layernorm(query.reshape(*query.shape[:2], -1, width))
        self.kept = self.k_layernorm(key), value.to(key.dtype)
        return query, *self.kept

    @property
    def _epsilon(self) -> float:
        return float(self.config.layernorm_epsilon)


class Gemma4Layer(TransformerLayer):  # type: ignore[misc]  # megatron is untyped
    """A layer behind which its own input is added and all is scaled by a number of its own."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int = 1,
        *,
        inputs: LayerInputs,
        **keywords: Any,
    ) -> None:
        plain = config
        if inputs.wide and layer_number > config.num_layers - inputs.shared:
            config = copy(config)
            config.ffn_hidden_size *= 2
        super().__init__(config, submodules, layer_number=layer_number, **keywords)
        self.plain = plain
        if self.is_moe_layer:
            Gemma4Experts.become(self.mlp)
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype))
        self.layer_input: torch.Tensor | None = None
        if inputs.width:
            dtype = {"bias": False, "dtype": config.params_dtype}
            self.per_layer_input_gate = nn.Linear(config.hidden_size, inputs.width, **dtype)
            self.per_layer_projection = nn.Linear(inputs.width, config.hidden_size, **dtype)
            self.post_per_layer_input_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """hidden_states: [s, b, hidden] → the same, and the context."""
        hidden, context = super().forward(*arguments, **keywords)
        if self.layer_input is not None:
            gated = nn.functional.gelu(self.per_layer_input_gate(hidden), approximate="tanh") * self.layer_input
            hidden = hidden + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return hidden * self.layer_scalar.to(hidden.dtype), context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Under Megatron-Bridge's names: attention of each kind is a stack of its own, norms stand beside it."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: self._placed(entry, bool(sharded_offsets)) for name, entry in found.items()}

    def _placed(self, entry: Any, stacked: bool) -> Any:
        for own, theirs in (NORMS if self.is_moe_layer else _NORMS).items():
            if own in entry.key:
                return replace(entry, key=entry.key.replace(own, theirs))
        if ".self_attention." not in entry.key:
            return entry
        kinds = [
            bool(is_layer_window_attention(self.plain.window_size, self.plain.window_attn_skip_freq, number + 1))
            for number in range(self.plain.num_layers)
        ]
        windowed = kinds[self.layer_number - 1]
        key = entry.key.replace(".self_attention.", f".self_attention_{'sliding' if windowed else 'global'}.")
        if not stacked:  # a key for each layer
            return replace(entry, key=key)
        stack = {
            "global_shape": (kinds.count(windowed), *entry.global_shape[1:]),
            "global_offset": (kinds[: self.layer_number - 1].count(windowed), *entry.global_offset[1:]),
        }
        if isinstance(entry, ShardedTensor):
            stack["axis_fragmentations"] = (kinds.count(windowed), *entry.axis_fragmentations[1:])
        return replace(entry, key=key, **stack)


#: Norms that are of a linear here, on GPUs those before one too, and modules of the layer in the checkpoint.
_NORMS: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_proj.post_layernorm.": "post_self_attn_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_mlp_layernorm.",
}


def be_gemma4(layer: ModuleSpec, kinds: Kinds, inputs: LayerInputs) -> None:
    """Make `layer` one of Gemma 4."""
    attend_by_kind(layer, kinds, Gemma4Attention, inputs=inputs)
    layer.module, layer.params = Gemma4Layer, {**(layer.params or {}), "inputs": inputs}
    layer.submodules.sharded_state_dict_keys_map = {}
    if holds_experts(layer):
        layer.submodules.pre_mlp_layernorm = IdentityOp
        layer.submodules.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def connect(model: Any, inputs: LayerInputs) -> None:
    """Give the layers of a built model what they take from one another and from its tokens.

    UnsupportedError where pipeline stages part them.
    """
    layers = model.decoder.layers
    if (inputs.shared or inputs.width) and len(layers) != model.config.num_layers:
        raise UnsupportedError("Gemma 4's layers take keys, values and inputs from the first stage: without ‹pp›")
    if inputs.shared and model.config.recompute_granularity is not None:
        raise UnsupportedError("Gemma 4's shared keys and values are not recomputed")
    last: dict[bool, Gemma4Attention] = {}
    for layer in layers:
        attention = layer.self_attention
        if attention.shares:
            attention.take_from(last[attention.windowed])
        else:
            last[attention.windowed] = attention
    if not inputs.width:
        return
    config, count = model.config, len(layers)
    wide, drawn = count * inputs.width, config.init_method
    model.per_layer_embedding = VocabParallelEmbedding(inputs.vocab, wide, init_method=drawn, config=config)
    model.per_layer_model_proj = nn.Linear(config.hidden_size, wide, bias=False, dtype=config.params_dtype)
    model.per_layer_proj_norm = LocalNorm(config, inputs.width, config.layernorm_epsilon)

    def hand_out(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], embedded: torch.Tensor) -> None:
        """embedded: [s, b, hidden], scaled; this rank's tokens."""
        ids = named.get("input_ids", given[0] if given else None)
        own = model.per_layer_embedding(ids).transpose(0, 1)
        own = own * own.new_full((), inputs.width**0.5)
        if config.sequence_parallel:
            own = mappings.scatter_to_sequence_parallel_region(own)
        seen = (model.per_layer_model_proj(embedded) * config.hidden_size**-0.5).unflatten(-1, (count, -1))
        both = (model.per_layer_proj_norm(seen) + own.unflatten(-1, (count, -1))) * 2.0**-0.5
        for number, layer in enumerate(layers):
            layer.layer_input = both[:, :, number]

    model.embedding.register_forward_hook(hand_out, with_kwargs=True)
