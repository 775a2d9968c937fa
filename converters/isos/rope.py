"""Rotary embeddings: bases, scaling rules and their constants."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.expr import Value
from converters.isos.base import Fields, number

#: What megatron.core.models.common.embeddings.rotary_pos_embedding hard-codes for Llama 3 scaling.
LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Llama 3 or linear scaling."""
    scaling = hf.get("rope_scaling")
    off: Fields = {
        "model.rope_scaling": False,
        "model.rope_scaling_factor": 8.0,
        "model.seq_len_interpolation_factor": None,
    }
    if scaling is None:
        return off
    if not isinstance(scaling, Mapping):
        raise UsageError(f"config: rope_scaling is {scaling!r}, an object was expected")
    kind = scaling.get("rope_type")
    if kind == "linear":
        return {**off, "model.seq_len_interpolation_factor": scaling.get("factor")}
    if kind != "llama3":
        raise UsageError(
            f"config: rope_scaling of type {kind!r} has no Megatron Core counterpart in this architecture",
            hint="supported here: llama3, linear",
        )
    return {**off, "model.rope_scaling": True, "model.rope_scaling_factor": scaling.get("factor")}


def rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.rope_scaling"):
        return {
            "rope_scaling": {"rope_type": "llama3", "factor": mcore.get("model.rope_scaling_factor"), **LLAMA3_FIXED}
        }
    if (factor := mcore.get("model.seq_len_interpolation_factor")) is not None:
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    return {"rope_scaling": None}


def inexpressible_rope(hf: Mapping[str, Value]) -> list[str]:
    """Rotary constants of `hf` that Megatron Core fixes at another value, one line each.

    Weights convert all the same; a forward pass in Megatron Core would differ.
    """
    scaling = hf.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") != "llama3":
        return []
    return [
        f"rope_scaling.{key} is {scaling.get(key)}; Megatron Core fixes {fixed:g}"
        for key, fixed in LLAMA3_FIXED.items()
        if scaling.get(key) != fixed
    ]


#: Keys of a YaRN `rope_scaling` and the attributes megatron/core/models/gpt/gpt_model.py reads, with what
#: Transformers takes where the key is absent.
YARN: dict[str, tuple[str, Value]] = {
    "factor": ("yarn_rotary_scaling_factor", None),
    "original_max_position_embeddings": ("yarn_original_max_position_embeddings", None),
    "beta_fast": ("yarn_beta_fast", 32.0),
    "beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("yarn_mscale", None),
    "mscale_all_dim": ("yarn_mscale_all_dim", None),
    "truncate": ("yarn_correction_range_round_to_int", True),
}


#: Scales queries by their position on top (Ministral 3); Megatron Core has no field for it.
_QUERY_SCALING = "llama_4_scaling_beta"


def yarn_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """YaRN, or what `rope` accepts; decides `position_embedding_type`."""
    scaling = hf.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") != "yarn":
        return {"model.position_embedding_type": "rope", **rope_to_mcore(hf)}
    known = {*YARN, "rope_type", "type", _QUERY_SCALING}
    if unknown := sorted(key for key, value in scaling.items() if key not in known and value is not None):
        raise UsageError(f"config: rope_scaling.{unknown[0]} of type 'yarn' has no Megatron Core counterpart")
    fields: Fields = {"model.position_embedding_type": "yarn", **rope_to_mcore({})}
    for key, (field, default) in YARN.items():
        value = scaling.get(key)
        fields[field] = default if value is None else value
    if fields["yarn_original_max_position_embeddings"] is None:
        fields["yarn_original_max_position_embeddings"] = hf.get("max_position_embeddings")
    number(fields["yarn_rotary_scaling_factor"], "rope_scaling.factor")
    if scaling.get(_QUERY_SCALING) is not None:
        fields[_QUERY_SCALING] = scaling[_QUERY_SCALING]
    return fields


def yarn_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.position_embedding_type") != "yarn":
        return rope_to_hf(mcore)
    scaling: dict[str, Value] = {"rope_type": "yarn"}
    for key, (field, default) in YARN.items():
        if (value := mcore.get(field)) is not None and not (key == "truncate" and value is default):
            scaling[key] = value
    if _QUERY_SCALING in mcore:
        scaling[_QUERY_SCALING] = mcore[_QUERY_SCALING]
    return {"rope_scaling": scaling}


def longrope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Phi's per-frequency factors, kept whole under names that Megatron Core does not have, or what `rope` accepts."""
    scaling = hf.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") not in ("longrope", "su"):
        return {"model.position_embedding_type": "rope", **rope_to_mcore(hf)}
    return {
        "model.position_embedding_type": "longrope",
        **rope_to_mcore({}),
        "longrope_scaling": scaling,
        "longrope_original_max_position_embeddings": hf.get("original_max_position_embeddings"),
    }


def longrope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.position_embedding_type") != "longrope":
        return rope_to_hf(mcore)
    length = mcore.get("longrope_original_max_position_embeddings")
    return {"rope_scaling": mcore.get("longrope_scaling"), "original_max_position_embeddings": length}


#: Keys of a YaRN `rope_scaling` and the MLATransformerConfig fields, with what Transformers takes for an absent key.
MLA_YARN: dict[str, tuple[str, Value]] = {
    "factor": ("rotary_scaling_factor", None),
    "original_max_position_embeddings": ("original_max_position_embeddings", None),
    "beta_fast": ("beta_fast", 32.0),
    "beta_slow": ("beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}


def mla_rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """YaRN or plain rotary embedding of latent attention; mcore's own defaults are DeepSeek-V2's, so all are set."""
    scaling = hf.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") != "yarn":
        raise UsageError(f"config: rope_scaling {scaling!r} has no counterpart in latent attention; yarn has")
    plain = {"truncate": True, "rope_type": "yarn"}  # correction ranges are whole numbers, as in Megatron Core
    extra = {key: value for key, value in scaling.items() if key not in MLA_YARN and value is not None}
    if unknown := sorted(key for key, value in extra.items() if plain.get(key) != value):
        raise UsageError(f"config: rope_scaling.{unknown[0]} has no Megatron Core counterpart in latent attention")
    if bool(scaling.get("mscale")) != bool(scaling.get("mscale_all_dim")) and scaling.get("mscale") not in (None, 1):
        raise UsageError("config: rope_scaling has one of mscale and mscale_all_dim; Megatron Core needs both")
    fields: Fields = {"rope_type": "yarn"}
    for key, (field, default) in MLA_YARN.items():
        value = scaling.get(key)
        fields[field] = default if value is None else value
    if fields["original_max_position_embeddings"] is None:
        fields["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    number(fields["rotary_scaling_factor"], "rope_scaling.factor")
    return fields


def mla_rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("rope_type") != "yarn":
        return {"rope_scaling": None}
    return {"rope_scaling": {"rope_type": "yarn", **{key: mcore.get(field) for key, (field, _) in MLA_YARN.items()}}}


def rotary_dim_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """Rotated dimensions of a head ↔ their share of it."""
    return 1.0 if value is None else number(value, "rotary_dim") / number(hf.get("head_dim"), "head_dim")


def rotary_dim_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    return round(number(value, "rotary_percent") * number(mcore.get("kv_channels"), "kv_channels"))
