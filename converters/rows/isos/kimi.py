"""Kimi Linear: which layers attend by the delta rule, and how wide they are."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, number, whole
from converters.rows.isos.layers import FULL

_LINEAR = "linear_attention"
#: Fields, by the keys of `linear_attn_config` and those that Transformers writes.
_WIDTHS = {
    "kda_num_heads": ("num_heads", "linear_num_heads", 32),
    "kda_head_dim": ("head_dim", "linear_head_dim", 128),
    "kda_conv_kernel_dim": ("short_conv_kernel_size", "linear_conv_kernel_dim", 4),
}


def layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`linear_attn_config`, whose layers count from 1, or `layer_types` ↔ a flag a layer, 1 = delta rule."""
    count, said = layers_of(hf, "num_hidden_layers"), hf.get("linear_attn_config") or {}
    if not isinstance(said, Mapping):
        raise UsageError(f"config: linear_attn_config is {said!r}, an object was expected")
    kinds, full, linear = hf.get("layer_types"), said.get("full_attn_layers"), said.get("kda_layers")
    if isinstance(full, list) and isinstance(linear, list):
        numbered = {whole(n, "kda_layers"): _LINEAR for n in linear} | {
            whole(n, "full_attn_layers"): FULL for n in full
        }
        listed = [numbered.get(layer) for layer in range(1, count + 1)]
        if len(full) + len(linear) != count or None in listed or kinds not in (None, listed):
            raise UsageError(
                "config: linear_attn_config: full_attn_layers and kda_layers are not the layers, each once"
            )
        kinds = [*listed]
    if not isinstance(kinds, list) or len(kinds) != count or set(map(str, kinds)) - {_LINEAR, FULL}:
        raise UsageError(f"config: layer_types is {kinds!r}; layers are {_LINEAR} or {FULL}")
    if unknown := sorted(set(said) - {"full_attn_layers", "kda_layers", *(own for own, _, _ in _WIDTHS.values())}):
        raise UsageError(
            f"config: linear_attn_config.{unknown[0]} is {said[unknown[0]]!r}; Kimi Linear has no such key"
        )
    widths = {field: said.get(own, hf.get(key, default)) for field, (own, key, default) in _WIDTHS.items()}
    return {"linear_attention_freq": [int(kind == _LINEAR) for kind in kinds], **widths}


def layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    flags = mcore.get("linear_attention_freq")
    if not isinstance(flags, list):
        raise UsageError(f"linear_attention_freq is {flags!r}; a flag for each layer was expected")
    layers = {key: [n for n, flag in enumerate(flags, 1) if flag == one] for key, one in _KINDS.items()}
    return {"linear_attn_config": {**layers, **{own: mcore.get(field) for field, (own, _, _) in _WIDTHS.items()}}}


def k3_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """The same of Kimi K3, whose decay is bounded from below and whose gate has a matrix of full rank."""
    said = hf.get("linear_attn_config")
    if not isinstance(said, Mapping) or said.get("use_full_rank_gate") is not True:
        raise UsageError(f"config: linear_attn_config is {said!r}; Kimi K3 has a gate of full rank there")
    bound = number(said.get("gate_lower_bound"), "linear_attn_config.gate_lower_bound")
    rest = {key: value for key, value in said.items() if key not in ("use_full_rank_gate", "gate_lower_bound")}
    return {**layers_to_mcore({**hf, "linear_attn_config": rest}), "kda_gate_lower_bound": bound}


def k3_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    said = layers_to_hf(mcore)["linear_attn_config"]
    assert isinstance(said, Mapping)
    more = {"use_full_rank_gate": True, "gate_lower_bound": mcore.get("kda_gate_lower_bound")}
    return {"linear_attn_config": {**said, **more}}


_KINDS = {"full_attn_layers": 0, "kda_layers": 1}
