"""Gemma 4: layers of two kinds, layers without keys, experts beside an MLP."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, whole


def heads_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Gemma 4: full layers have their own width of a head, and where keys are values their own number of key heads.

    `per_layer_config` of Transformers 5 says the same by the number of the layer.
    """
    if hf.get("use_bidirectional_attention") == "all":
        raise UsageError("config: use_bidirectional_attention is 'all'; a decoder was expected")
    same, groups = bool(hf.get("attention_k_eq_v")), layers_of(hf, "num_key_value_heads")
    windowed = {"head_dim": hf.get("head_dim", 256), "num_key_value_heads": groups}
    others = hf.get("num_global_key_value_heads")
    full = {"head_dim": hf.get("global_head_dim", 512), "num_key_value_heads": groups}
    if same and others is not None:
        full["num_key_value_heads"] = others
    listed = hf.get("per_layer_config")
    said = list(listed.values()) if isinstance(listed, Mapping) else []
    if any(own != said[0] or not isinstance(own, Mapping) for own in said):
        raise UsageError(f"config: per_layer_config is {listed!r}; full layers were expected to be alike")
    if said and isinstance(said[0], Mapping):
        full = {**windowed, **said[0]}
    return {
        "kv_channels": full["head_dim"],
        "num_query_groups": full["num_key_value_heads"],
        "windowed_kv_channels": windowed["head_dim"],
        "windowed_num_query_groups": groups,
        "attention_k_eq_v": same,
    }


def heads_to_hf(mcore: Mapping[str, Value]) -> Fields:
    same = bool(mcore.get("attention_k_eq_v"))
    return {
        "head_dim": mcore.get("windowed_kv_channels"),
        "global_head_dim": mcore.get("kv_channels"),
        "num_key_value_heads": mcore.get("windowed_num_query_groups"),
        "num_global_key_value_heads": mcore.get("num_query_groups") if same else None,
        "attention_k_eq_v": same,
    }


def sharing_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Gemma 4: the last layers without keys and values of their own, which no stack of all layers can hold."""
    shared = whole(hf.get("num_kv_shared_layers") or 0, "num_kv_shared_layers")
    wide = bool(hf.get("use_double_wide_mlp")) and shared > 0
    own: Fields = {"num_kv_shared_layers": shared, "use_double_wide_mlp": wide}
    return {**own, "hetereogenous_dist_checkpoint": True} if shared else own  # sic


def sharing_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {name: mcore.get(name) for name in ("num_kv_shared_layers", "use_double_wide_mlp")}


_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "top_k_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


def experts_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Gemma 4: experts in every layer, beside the MLP, or in none."""
    if not hf.get("enable_moe_block"):
        return dict.fromkeys((*_EXPERTS, "moe_shared_expert_intermediate_size"))
    counts: Fields = {field: layers_of(hf, key) for field, key in _EXPERTS.items()}
    return {**counts, "moe_shared_expert_intermediate_size": layers_of(hf, "intermediate_size")}


def experts_to_hf(mcore: Mapping[str, Value]) -> Fields:
    counts = {key: mcore.get(field) for field, key in _EXPERTS.items()}
    return {"enable_moe_block": mcore.get("num_moe_experts") is not None, **counts}
