"""Rotary embeddings: bases, scaling rules and their constants."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, number, positive

#: What megatron.core.models.common.embeddings.rotary_pos_embedding hard-codes for Llama 3 scaling.
LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

#: By how much the context may grow behind its end (`_compute_dynamic_ntk_parameters`); no field of Megatron Core.
_DYNAMIC = "rope_dynamic_factor"
#: The share of the pairs that turn, the others standing (`_compute_proportional_rope_parameters`); no field either.
_PROPORTION = "rope_proportion"
#: Fields of rotary embeddings that are not YaRN's.
PLAIN = (
    *("model.rope_scaling", "model.rope_scaling_factor", "model.seq_len_interpolation_factor"),
    *(_DYNAMIC, _PROPORTION),
)


def rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Llama 3, linear or dynamic scaling; dynamic leaves every position of the model's own context as it is."""
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
    if kind == "yarn":
        raise UsageError(
            "config: rope_scaling of type 'yarn' is not tested with this architecture; Megatron Core itself has it",
            hint='in a copy of the table put `yarn = "rope_scaling"` under [config.via] in place of `rope`, leave '
            "`model.position_embedding_type` out of [config.fixed], and prove it: `mbx verify parity ‹forward›` with "
            "‹mapping› FILE",
        )
    if kind == "proportional":
        _check_known(scaling, {"factor", "partial_rotary_factor"})
        share, factor = scaling.get("partial_rotary_factor"), scaling.get("factor")
        stretched = None if factor is None else positive(factor, "rope_scaling.factor")
        turning = 1.0 if share is None else positive(share, "partial_rotary_factor")
        return {**off, _PROPORTION: turning, "model.seq_len_interpolation_factor": stretched}
    if kind not in ("linear", "llama3", "dynamic"):
        raise UsageError(
            f"config: rope_scaling of type {kind!r} is none that this table takes",
            hint="tables take linear, llama3, dynamic and proportional; those that say so, yarn or longrope",
        )
    _check_known(scaling, {"factor", *(LLAMA3_FIXED if kind == "llama3" else ())})
    factor = positive(scaling.get("factor"), "rope_scaling.factor")
    if kind == "linear":
        return {**off, "model.seq_len_interpolation_factor": factor}
    if kind == "dynamic":
        return {**off, _DYNAMIC: factor}
    return {**off, "model.rope_scaling": True, "model.rope_scaling_factor": factor}


def _check_known(scaling: Mapping[str, Value], known: Collection[str]) -> None:
    """UsageError for a key that may change the rotation and that nothing here reads."""
    if unknown := sorted(
        set(scaling) - {*known, "rope_type"} - {key for key, value in scaling.items() if value is None}
    ):
        raise UsageError(
            f"config: rope_scaling.{unknown[0]} of type {scaling.get('rope_type')!r} has no Megatron Core counterpart"
        )


def rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.rope_scaling"):
        return {
            "rope_scaling": {"rope_type": "llama3", "factor": mcore.get("model.rope_scaling_factor"), **LLAMA3_FIXED}
        }
    if (share := mcore.get(_PROPORTION)) is not None:
        scaling: dict[str, Value] = {"rope_type": "proportional", "partial_rotary_factor": share}
        if (factor := mcore.get("model.seq_len_interpolation_factor")) is not None:
            scaling["factor"] = factor
        return {"rope_scaling": scaling}
    if (factor := mcore.get(_DYNAMIC)) is not None:
        return {"rope_scaling": {"rope_type": "dynamic", "factor": factor}}
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
    _check_known(scaling, {*YARN, _QUERY_SCALING, *_implied_factor(scaling)})
    fields: Fields = {
        "model.position_embedding_type": "yarn",
        **rope_to_mcore({}),
        **_yarn_fields(YARN, scaling, hf),
    }
    if scaling.get(_QUERY_SCALING) is not None:
        fields[_QUERY_SCALING] = scaling[_QUERY_SCALING]
    return fields


def _implied_factor(scaling: Mapping[str, Value]) -> set[str]:
    """`attention_factor` where it says only what follows from the scaling factor without it (as in OLMo 3)."""
    said, plain = scaling.get("attention_factor"), scaling.get("mscale") is None
    if said is None or not plain:
        return set()
    implied = 0.1 * math.log(max(1.0, positive(scaling.get("factor"), "rope_scaling.factor"))) + 1.0
    return {"attention_factor"} if math.isclose(number(said, "attention_factor"), implied, rel_tol=1e-9) else set()


def _yarn_fields(
    keys: Mapping[str, tuple[str, Value]], scaling: Mapping[str, Value], hf: Mapping[str, Value]
) -> Fields:
    """The fields that `keys` names, each as the config says it or as Transformers takes it where it does not."""
    said = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    said |= {key: value for key, value in scaling.items() if value is not None}
    positive(said.get("factor"), "rope_scaling.factor")
    fields: Fields = {}
    for key, (field, default) in keys.items():
        value = fields[field] = said.get(key, default)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UsageError(f"config: rope_scaling.{key} is {value!r}, true or false was expected")
        if value is not None and not isinstance(default, bool):
            number(value, f"rope_scaling.{key}")
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
    return {"rope_type": "yarn", **_yarn_fields(MLA_YARN, scaling, hf)}


def mla_rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("rope_type") != "yarn":
        return {"rope_scaling": None}
    return {"rope_scaling": {"rope_type": "yarn", **{key: mcore.get(field) for key, (field, _) in MLA_YARN.items()}}}


def neox_rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """GPT-NeoX's own words for the base and the rotated share of a head, or everybody's."""
    out: Fields = {}
    for field, default, words in (
        ("model.rotary_base", 10000.0, ("rope_theta", "rotary_emb_base")),
        ("model.rotary_percent", 0.25, ("partial_rotary_factor", "rotary_pct")),
    ):
        said = [hf[word] for word in words if hf.get(word) is not None]
        if any(value != said[0] for value in said):
            raise UsageError(f"config: {' and '.join(words)} disagree: {said}")
        out[field] = positive(said[0], words[1]) if said else default
    return out


def neox_rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"rotary_emb_base": mcore.get("model.rotary_base"), "rotary_pct": mcore.get("model.rotary_percent")}


def rotary_dim_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """Rotated dimensions of a head ↔ their share of it."""
    return 1.0 if value is None else number(value, "rotary_dim") / positive(hf.get("head_dim"), "head_dim")


def rotary_dim_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    return round(number(value, "rotary_percent") * number(mcore.get("kv_channels"), "kv_channels"))
