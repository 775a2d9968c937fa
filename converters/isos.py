"""Registered conversions between Hugging Face config values and Megatron Core ones, both ways.

`VALUE` pairs translate one key; `FIELDS` translate a group of keys into a group of fields. Law of each:
`to_hf(to_mcore(x)) == x` for every x that `to_mcore` accepts; what it does not accept is a UsageError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.errors import UsageError
from converters.expr import Value

Fields = dict[str, Value]


@dataclass(frozen=True, slots=True)
class ValueIso:
    """One Hugging Face value ↔ one Megatron Core value; the second argument is the whole config of that side."""

    to_mcore: Callable[[Value, Mapping[str, Value]], Value]
    to_hf: Callable[[Value, Mapping[str, Value]], Value]


@dataclass(frozen=True, slots=True)
class FieldsIso:
    """A group of Hugging Face keys ↔ a group of Megatron Core fields (`mcore` names them)."""

    mcore: tuple[str, ...]
    to_mcore: Callable[[Mapping[str, Value]], Fields]
    to_hf: Callable[[Mapping[str, Value]], Fields]


def number(value: Value, what: str) -> float:
    """`value` as a number; UsageError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"config: {what} is {value!r}, a number was expected")
    return value


# --- rotary scaling --------------------------------------------------------------------------------------------

#: What megatron.core.models.common.embeddings.rotary_pos_embedding hard-codes for Llama 3 scaling.
LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
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


def _rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
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
_YARN: dict[str, tuple[str, Value]] = {
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


def _yarn_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """YaRN, or what `rope` accepts; decides `position_embedding_type`."""
    scaling = hf.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") != "yarn":
        return {"model.position_embedding_type": "rope", **_rope_to_mcore(hf)}
    known = {*_YARN, "rope_type", "type", _QUERY_SCALING}
    if unknown := sorted(key for key, value in scaling.items() if key not in known and value is not None):
        raise UsageError(f"config: rope_scaling.{unknown[0]} of type 'yarn' has no Megatron Core counterpart")
    fields: Fields = {"model.position_embedding_type": "yarn", **_rope_to_mcore({})}
    for key, (field, default) in _YARN.items():
        value = scaling.get(key)
        fields[field] = default if value is None else value
    if fields["yarn_original_max_position_embeddings"] is None:
        fields["yarn_original_max_position_embeddings"] = hf.get("max_position_embeddings")
    number(fields["yarn_rotary_scaling_factor"], "rope_scaling.factor")
    if scaling.get(_QUERY_SCALING) is not None:
        fields[_QUERY_SCALING] = scaling[_QUERY_SCALING]
    return fields


def _yarn_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.position_embedding_type") != "yarn":
        return _rope_to_hf(mcore)
    scaling: dict[str, Value] = {"rope_type": "yarn"}
    for key, (field, default) in _YARN.items():
        if (value := mcore.get(field)) is not None and not (key == "truncate" and value is default):
            scaling[key] = value
    if _QUERY_SCALING in mcore:
        scaling[_QUERY_SCALING] = mcore[_QUERY_SCALING]
    return {"rope_scaling": scaling}


def _longrope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Phi's per-frequency factors, kept whole under names that Megatron Core does not have, or what `rope` accepts."""
    scaling = hf.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") not in ("longrope", "su"):
        return {"model.position_embedding_type": "rope", **_rope_to_mcore(hf)}
    return {
        "model.position_embedding_type": "longrope",
        **_rope_to_mcore({}),
        "longrope_scaling": scaling,
        "longrope_original_max_position_embeddings": hf.get("original_max_position_embeddings"),
    }


def _longrope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.position_embedding_type") != "longrope":
        return _rope_to_hf(mcore)
    length = mcore.get("longrope_original_max_position_embeddings")
    return {"rope_scaling": mcore.get("longrope_scaling"), "original_max_position_embeddings": length}


# --- attention windows and layer patterns ------------------------------------------------------------------------


def _window_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Sliding window of W tokens, the current one included ↔ mcore's (W-1 to the left, 0 to the right)."""
    width = hf.get("sliding_window")
    if hf.get("use_sliding_window") is False:
        width = None
    return {"window_size": None if width is None else [int(number(width, "sliding_window")) - 1, 0]}


def _window_to_hf(mcore: Mapping[str, Value]) -> Fields:
    window = mcore.get("window_size")
    return {"sliding_window": None if not isinstance(window, list) else int(number(window[0], "window_size")) + 1}


def _sliding_layers_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """`layer_types` ↔ mcore's flag per layer, 1 = windowed; without it every `sliding_window_pattern`-th is full."""
    if value is None:
        return hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    kinds = {"sliding_attention": 1, "full_attention": 0}
    if not isinstance(value, list) or any(kind not in kinds for kind in value):
        raise UsageError(f"config: layer_types is {value!r}; only {' and '.join(kinds)} are known here")
    return [kinds[str(kind)] for kind in value]


def _sliding_layers_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    if isinstance(value, int) and not isinstance(value, bool):
        layers = int(number(mcore.get("num_layers"), "num_layers"))
        value = [int((layer + 1) % value != 0) for layer in range(layers)]
    if not isinstance(value, list):
        return None
    return ["sliding_attention" if windowed else "full_attention" for windowed in value]


def _no_rope_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """`no_rope_layers` (1 = rotated) ↔ mcore's flag per layer, 1 = not rotated; without it every fourth is not."""
    if value is None:
        every = int(number(hf.get("no_rope_layer_interval", 4), "no_rope_layer_interval"))
        layers = int(number(hf.get("num_hidden_layers"), "num_hidden_layers"))
        value = [int((layer + 1) % every != 0) for layer in range(layers)]
    return _flipped(value)


def _flipped(value: Value) -> Value:
    if not isinstance(value, list) or any(flag not in (0, 1) for flag in value):
        raise UsageError(f"config: no_rope_layers is {value!r}, a list of 0 and 1 was expected")
    return [1 - int(number(flag, "no_rope_layers")) for flag in value]


def _gelu_tanh_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Gemma's activation: `hidden_activation` wins over `hidden_act`, whose "gelu" always meant the tanh form."""
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    if name not in ("gelu", "gelu_pytorch_tanh"):
        raise UsageError(f"config: the activation is {name!r}; this architecture covers only 'gelu_pytorch_tanh'")
    return {"activation_func": "gelu_tanh"}


def _gelu_tanh_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


# --- mixture of experts, latent attention, hybrids ----------------------------------------------------------------


def _layers(config: Mapping[str, Value], key: str) -> int:
    return int(number(config.get(key), key))


def _moe_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Every `decoder_sparse_step`-th layer holds experts, those of `mlp_only_layers` never; 1 where all layers do."""
    step, only = hf.get("decoder_sparse_step"), hf.get("mlp_only_layers") or []
    every = 1 if step is None else int(number(step, "decoder_sparse_step"))
    if not isinstance(only, list) or every < 1:
        raise UsageError(f"config: decoder_sparse_step is {step!r} and mlp_only_layers is {only!r}")
    if every == 1 and not only:
        return {"moe_layer_freq": 1}
    layers = range(_layers(hf, "num_hidden_layers"))
    return {"moe_layer_freq": [int(layer not in only and (layer + 1) % every == 0) for layer in layers]}


def _moe_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    """The step that needs the fewest exceptions says the same layers."""
    flags = mcore.get("moe_layer_freq")
    if not isinstance(flags, list):
        return {"decoder_sparse_step": 1, "mlp_only_layers": []}
    spellings: list[tuple[int, int, list[Value]]] = []
    for step in range(1, len(flags) + 1):
        stepped = [layer for layer in range(len(flags)) if (layer + 1) % step == 0]
        if {layer for layer, flag in enumerate(flags) if flag} <= set(stepped):
            only: list[Value] = [layer for layer in stepped if not flags[layer]]
            spellings.append((len(only), step, only))
    _, step, only = min(spellings, key=lambda spelling: spelling[:2])
    return {"decoder_sparse_step": step, "mlp_only_layers": only}


def _first_dense_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """`first_k_dense_replace` ↔ mcore's flag per layer, always spelt out as Megatron-Bridge does."""
    dense = int(number(value, "first_k_dense_replace"))
    return [int(layer >= dense) for layer in range(_layers(hf, "num_hidden_layers"))]


def _first_dense_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    if value == 1:
        return 0
    if not isinstance(value, list) or value != sorted(value, key=lambda flag: int(number(flag, "moe_layer_freq"))):
        raise UsageError(f"config: moe_layer_freq is {value!r}; this architecture has its dense layers first")
    return value.count(0)


def _shared_experts_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """Number of shared experts ↔ the width of all of them together, None where there is none."""
    count = int(number(value or 0, "shared experts"))
    return count * int(number(hf.get("moe_intermediate_size"), "moe_intermediate_size")) or None


def _shared_experts_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    width = int(number(mcore.get("moe_ffn_hidden_size"), "moe_ffn_hidden_size"))
    return int(number(value or 0, "moe_shared_expert_intermediate_size")) // width


def _greedy_groups_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """DeepSeek-V2's `topk_method`: only `group_limited_greedy` looks at expert groups."""
    method = hf.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise UsageError(f"config: topk_method is {method!r}; known here are greedy and group_limited_greedy")
    limited = method == "group_limited_greedy"
    return {
        "moe_router_num_groups": hf.get("n_group") if limited else None,
        "moe_router_group_topk": hf.get("topk_group") if limited else None,
    }


def _greedy_groups_to_hf(mcore: Mapping[str, Value]) -> Fields:
    groups, top = mcore.get("moe_router_num_groups"), mcore.get("moe_router_group_topk")
    if groups is None:
        return {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": top}


#: Keys of a YaRN `rope_scaling` and the MLATransformerConfig fields, with what Transformers takes for an absent key.
_MLA_YARN: dict[str, tuple[str, Value]] = {
    "factor": ("rotary_scaling_factor", None),
    "original_max_position_embeddings": ("original_max_position_embeddings", None),
    "beta_fast": ("beta_fast", 32.0),
    "beta_slow": ("beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}


def _mla_rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """YaRN or plain rotary embedding of latent attention; mcore's own defaults are DeepSeek-V2's, so all are set."""
    scaling = hf.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") != "yarn":
        raise UsageError(f"config: rope_scaling {scaling!r} has no counterpart in latent attention; yarn has")
    plain = {"truncate": True, "rope_type": "yarn"}  # correction ranges are whole numbers, as in Megatron Core
    extra = {key: value for key, value in scaling.items() if key not in _MLA_YARN and value is not None}
    if unknown := sorted(key for key, value in extra.items() if plain.get(key) != value):
        raise UsageError(f"config: rope_scaling.{unknown[0]} has no Megatron Core counterpart in latent attention")
    if bool(scaling.get("mscale")) != bool(scaling.get("mscale_all_dim")) and scaling.get("mscale") not in (None, 1):
        raise UsageError("config: rope_scaling has one of mscale and mscale_all_dim; Megatron Core needs both")
    fields: Fields = {"rope_type": "yarn"}
    for key, (field, default) in _MLA_YARN.items():
        value = scaling.get(key)
        fields[field] = default if value is None else value
    if fields["original_max_position_embeddings"] is None:
        fields["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    number(fields["rotary_scaling_factor"], "rope_scaling.factor")
    return fields


def _mla_rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("rope_type") != "yarn":
        return {"rope_scaling": None}
    return {"rope_scaling": {"rope_type": "yarn", **{key: mcore.get(field) for key, (field, _) in _MLA_YARN.items()}}}


def _linear_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`layer_types` or `full_attention_interval` ↔ mcore's linear_attention_freq N: each N-th layer is full."""
    kinds, every = hf.get("layer_types"), hf.get("full_attention_interval")
    if kinds is not None:
        if not isinstance(kinds, list) or "full_attention" not in kinds:
            raise UsageError(f"config: layer_types is {kinds!r}; a full_attention layer was expected")
        period = kinds.index("full_attention") + 1
        if kinds != _linear_layers(period, len(kinds)) or every not in (None, period):
            raise UsageError("config: layer_types does not repeat with one full_attention layer in each period")
        every = period
    return {"linear_attention_freq": int(number(every, "full_attention_interval"))}


def _linear_layers(period: int, count: int) -> list[Value]:
    return ["linear_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]


def _linear_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    period = _layers(mcore, "linear_attention_freq")
    return {"full_attention_interval": period, "layer_types": _linear_layers(period, _layers(mcore, "num_layers"))}


_HYBRID_KINDS = {
    **dict.fromkeys(("linear_attention", "mamba"), "M"),
    **dict.fromkeys(("full_attention", "attention"), "*"),
    "mlp": "-",
    "moe": "E",
}


def _hybrid_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`hybrid_override_pattern`, or `layers_block_type` as v5 writes it, ↔ the pattern and its length."""
    pattern, kinds = hf.get("hybrid_override_pattern"), hf.get("layers_block_type")
    if pattern is None:
        if not isinstance(kinds, list) or any(kind not in _HYBRID_KINDS for kind in kinds):
            raise UsageError(f"config: layers_block_type is {kinds!r}; kinds are {', '.join(_HYBRID_KINDS)}")
        pattern = "".join(_HYBRID_KINDS[str(kind)] for kind in kinds)
    if not isinstance(pattern, str) or set(pattern) - {*_HYBRID_KINDS.values()}:
        raise UsageError(f"config: hybrid_override_pattern is {pattern!r}; layers are M, *, - and E")
    if hf.get("num_hidden_layers") not in (None, len(pattern)):
        raise UsageError(f"config: num_hidden_layers is {hf['num_hidden_layers']}, the pattern has {len(pattern)}")
    return {"num_layers": len(pattern), "model.hybrid_override_pattern": pattern}


def _hybrid_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {
        "num_hidden_layers": mcore.get("num_layers"),
        "hybrid_override_pattern": mcore.get("model.hybrid_override_pattern"),
    }


def _no_linear_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """MiniMax's `attn_type_list`: 1 is softmax attention, the only kind Megatron Core has here."""
    if value is not None and (not isinstance(value, list) or set(value) != {1}):
        raise UsageError(f"config: attn_type_list is {value!r}; only softmax attention (1) is covered")
    return None


def _rotary_dim_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """Rotated dimensions of a head ↔ their share of it."""
    return 1.0 if value is None else number(value, "rotary_dim") / number(hf.get("head_dim"), "head_dim")


def _rotary_dim_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    return round(number(value, "rotary_percent") * number(mcore.get("kv_channels"), "kv_channels"))


FIELDS: dict[str, FieldsIso] = {
    "moe_layers": FieldsIso(("moe_layer_freq",), _moe_layers_to_mcore, _moe_layers_to_hf),
    "greedy_groups": FieldsIso(
        ("moe_router_num_groups", "moe_router_group_topk"), _greedy_groups_to_mcore, _greedy_groups_to_hf
    ),
    "mla_rope": FieldsIso(
        ("rope_type", *(field for field, _ in _MLA_YARN.values())), _mla_rope_to_mcore, _mla_rope_to_hf
    ),
    "linear_layers": FieldsIso(("linear_attention_freq",), _linear_layers_to_mcore, _linear_layers_to_hf),
    "hybrid": FieldsIso(("num_layers", "model.hybrid_override_pattern"), _hybrid_to_mcore, _hybrid_to_hf),
    "rope": FieldsIso(
        ("model.rope_scaling", "model.rope_scaling_factor", "model.seq_len_interpolation_factor"),
        _rope_to_mcore,
        _rope_to_hf,
    ),
    "window": FieldsIso(("window_size",), _window_to_mcore, _window_to_hf),
    "yarn": FieldsIso(
        (
            "model.position_embedding_type",
            "model.rope_scaling",
            "model.rope_scaling_factor",
            "model.seq_len_interpolation_factor",
            *(field for field, _ in _YARN.values()),
            _QUERY_SCALING,
        ),
        _yarn_to_mcore,
        _yarn_to_hf,
    ),
    "longrope": FieldsIso(
        (
            "model.position_embedding_type",
            "model.rope_scaling",
            "model.rope_scaling_factor",
            "model.seq_len_interpolation_factor",
            "longrope_scaling",
            "longrope_original_max_position_embeddings",
        ),
        _longrope_to_mcore,
        _longrope_to_hf,
    ),
    "gelu_tanh": FieldsIso(("activation_func",), _gelu_tanh_to_mcore, _gelu_tanh_to_hf),
}

VALUE: dict[str, ValueIso] = {
    "first_dense": ValueIso(_first_dense_to_mcore, _first_dense_to_hf),
    "shared_experts": ValueIso(_shared_experts_to_mcore, _shared_experts_to_hf),
    "no_linear": ValueIso(_no_linear_to_mcore, lambda _, mcore: [1] * _layers(mcore, "num_layers")),
    "rotary_dim": ValueIso(_rotary_dim_to_mcore, _rotary_dim_to_hf),
    "no_rope": ValueIso(_no_rope_to_mcore, lambda v, _: _flipped(v)),
    "sliding_layers": ValueIso(_sliding_layers_to_mcore, _sliding_layers_to_hf),
    "not": ValueIso(lambda v, _: not v, lambda v, _: not v),
    "rsqrt": ValueIso(
        lambda v, _: 1.0 / math.sqrt(number(v, "scale")), lambda v, _: round(1.0 / number(v, "softmax_scale") ** 2, 6)
    ),
    "zero_is_none": ValueIso(lambda v, _: v or None, lambda v, _: v or 0),
}
