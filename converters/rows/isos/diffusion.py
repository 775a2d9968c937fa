"""Diffusion transformers in diffusers' words, and in those of Megatron-Bridge's providers."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of

#: Fields of a width that heads make up.
HEADS = ("num_attention_heads", "num_query_groups", "kv_channels", "hidden_size")


def heads_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`num_attention_heads` of `attention_head_dim` each ↔ as many groups, and a model as wide as all heads."""
    heads, width = layers_of(hf, "num_attention_heads"), layers_of(hf, "attention_head_dim")
    return {
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": width,
        "hidden_size": heads * width,
    }


def heads_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"num_attention_heads": mcore.get("num_attention_heads"), "attention_head_dim": mcore.get("kv_channels")}


def patch_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`patch_size` in time, height and width ↔ in time and in space: Bridge has one size for height and width."""
    size = hf.get("patch_size", [1, 2, 2])
    whole = isinstance(size, list) and len(size) == 3 and all(type(one) is int and one > 0 for one in size)
    if not isinstance(size, list) or not whole or size[1] != size[2]:
        raise UsageError(f"config: patch_size is {size!r}; [time, space, space] was expected, whole numbers above 0")
    return {"patch_temporal": size[0], "patch_spatial": size[1]}


def patch_to_hf(mcore: Mapping[str, Value]) -> Fields:
    space = mcore.get("patch_spatial")
    return {"patch_size": [mcore.get("patch_temporal"), space, space]}


def flux_channels_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """FLUX's `in_channels`. Bridge's model gives as many as it takes: those of Fill, Canny and Depth are refused."""
    taken, given = layers_of(hf, "in_channels"), hf.get("out_channels")
    if given not in (None, taken):
        raise UsageError(
            f"config: out_channels is {given!r} beside in_channels {taken}; Megatron-Bridge's FLUX gives as many "
            "channels as it takes"
        )
    return {"in_channels": taken}


def flux_channels_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"in_channels": mcore.get("in_channels")}


def flux_mlp_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """FLUX's MLPs are four times as wide as the model; no key of its config says so."""
    return {"ffn_hidden_size": 4 * layers_of(hf, "num_attention_heads") * layers_of(hf, "attention_head_dim")}


def flux_mlp_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("ffn_hidden_size") != 4 * layers_of(mcore, "hidden_size"):
        raise UsageError(f"ffn_hidden_size is {mcore.get('ffn_hidden_size')!r}; FLUX has 4 times its hidden_size")
    return {}
