"""Step-3.5: which layers are windowed, turn how, hold experts, and clamp what; lists go on over prediction layers."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, number, whole
from converters.rows.isos.layers import sliding_layers_to_hf, sliding_layers_to_mcore, window_to_hf, window_to_mcore

#: What a prediction layer is where a list ends with the decoder: windowed (Megatron-Bridge, `step35_bridge.py`).
_BEHIND = "sliding_attention"
_LISTS = ("swiglu_limits", "swiglu_limits_shared")


def layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`layer_types`, with heads of windowed layers by `attention_other_setting`.

    Bases and rotated shares are said a layer or once, and are the same in all layers of a kind. Prediction layers are
    windowed.
    """
    count, ahead = layers_of(hf, "num_hidden_layers"), whole(hf.get("num_nextn_predict_layers") or 0, "predictions")
    kinds = hf.get("layer_types")
    kinds = ["full_attention"] * count if kinds is None else kinds
    flags = sliding_layers_to_mcore(kinds, hf)
    if not isinstance(flags, list) or len(flags) not in (count, count + ahead) or 0 in flags[count:]:
        raise UsageError(
            f"config: layer_types is {kinds!r}; {count} layers were expected, and {ahead} windowed ones behind them"
        )
    other = hf.get("attention_other_setting") or {}
    if not isinstance(other, Mapping) or other.get("attention_type") not in (None, _BEHIND):
        raise UsageError(f"config: attention_other_setting is {other!r}; it is for windowed layers")
    for key, own in (("num_attention_groups", "num_attention_groups"), ("head_dim", "head_dim")):
        if other.get(key) not in (None, hf.get(own)):
            raise UsageError(f"config: attention_other_setting.{key} is {other[key]!r}, {own} is {hf.get(own)!r}")
    if other.get("true_head_dim") not in (None, hf.get("head_dim")):
        raise UsageError(f"config: attention_other_setting.true_head_dim is {other['true_head_dim']!r}")
    base, local = _by_kind(hf.get("rope_theta", 10000.0), flags, "rope_theta")
    share, whole_share = _by_kind(hf.get("partial_rotary_factors", 1.0), flags, "partial_rotary_factors")
    return {
        **window_to_mcore({"sliding_window": hf.get("sliding_window")}),
        "window_attn_skip_freq": flags[:count],
        "windowed_num_attention_heads": other.get("num_attention_heads", hf.get("num_attention_heads")),
        "model.rotary_base": base,
        "model.rotary_base_local": local,
        "model.rotary_percent": share,
        "model.rotary_percent_local": whole_share,
    }


def _by_kind(said: Value, flags: list[Value], key: str) -> tuple[float, float]:
    """What `said` is for full layers and for windowed ones."""
    if not isinstance(said, list):
        return number(said, key), number(said, key)
    if len(said) < len(flags):
        raise UsageError(f"config: {key} has {len(said)} entries, layer_types has {len(flags)}")
    found: list[float] = []
    for kind in (0, 1):
        values = {number(value, key) for value, flag in zip(said, flags, strict=False) if flag == kind}
        if len(values) > 1:
            raise UsageError(f"config: {key} is {said!r}; one number for each kind of layer was expected")
        found += values or {number(said[0], key)}
    return found[0], found[1]


def layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    flags = mcore.get("window_attn_skip_freq")
    kinds = sliding_layers_to_hf(flags, mcore)
    if not isinstance(flags, list) or not isinstance(kinds, list):
        raise UsageError(f"window_attn_skip_freq is {flags!r}; a flag for each layer was expected")
    ahead = whole(mcore.get("mtp_num_layers") or 0, "mtp_num_layers")
    full, windowed = (
        ("model.rotary_base", "model.rotary_percent"),
        ("model.rotary_base_local", "model.rotary_percent_local"),
    )
    by_layer = [windowed if flag else full for flag in [*flags, *[1] * ahead]]
    return {
        **window_to_hf(mcore),
        "layer_types": [*kinds, *[_BEHIND] * ahead],
        "rope_theta": [mcore.get(base) for base, _ in by_layer],
        "partial_rotary_factors": [mcore.get(share) for _, share in by_layer],
        "attention_other_setting": {
            "attention_type": _BEHIND,
            "num_attention_heads": mcore.get("windowed_num_attention_heads"),
            "num_attention_groups": mcore.get("num_query_groups"),
            "head_dim": mcore.get("kv_channels"),
        },
    }


def experts_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`moe_layers_enum`: the layers with experts, a list or their numbers with commas between; else all but three."""
    count, said = layers_of(hf, "num_hidden_layers"), hf.get("moe_layers_enum")
    if said is None:
        return {"moe_layer_freq": [int(layer >= 3) for layer in range(count)]}
    listed = [part.strip() for part in said.split(",") if part.strip()] if isinstance(said, str) else said
    if not isinstance(listed, list) or not all(str(layer).isdecimal() for layer in listed):
        raise UsageError(f"config: moe_layers_enum is {said!r}; numbers of layers were expected")
    chosen = {int(str(layer)) for layer in listed}
    if beyond := sorted(chosen - set(range(count))):
        raise UsageError(
            f"config: moe_layers_enum names layer {beyond[0]}; there are {count}, and prediction is dense"
        )
    return {"moe_layer_freq": [int(layer in chosen) for layer in range(count)]}


def experts_to_hf(mcore: Mapping[str, Value]) -> Fields:
    flags = mcore.get("moe_layer_freq")
    if not isinstance(flags, list):
        raise UsageError(f"moe_layer_freq is {flags!r}; a flag for each layer was expected")
    return {"moe_layers_enum": ",".join(str(layer) for layer, flag in enumerate(flags) if flag)}


def limits_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Bounds of the gated halves of experts and of all other MLPs by layer; null and 0 are none."""
    count = layers_of(hf, "num_hidden_layers")
    out: Fields = {}
    for key in _LISTS:
        said = hf.get(key)
        if said is not None and (not isinstance(said, list) or len(said) < count):
            raise UsageError(f"config: {key} is {said!r}; a number for each of {count} layers was expected")
        limits = [number(limit or 0.0, key) for limit in said or ()][:count]
        out[key] = limits if any(limits) else None
        if isinstance(said, list) and any(said[count:]):
            raise UsageError(f"config: {key} clamps prediction layers, of which no class says how")
    return out


def limits_to_hf(mcore: Mapping[str, Value]) -> Fields:
    count = layers_of(mcore, "num_layers") + whole(mcore.get("mtp_num_layers") or 0, "mtp_num_layers")
    out: Fields = {}
    for key in _LISTS:
        limits = mcore.get(key)
        limits = limits if isinstance(limits, list) else []
        out[key] = [*limits, *[0.0] * (count - len(limits))]
    return out
