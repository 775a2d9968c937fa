"""What single provider classes of Megatron-Bridge mean by their fields, in Megatron Core's terms, both ways.

Bridge subclasses the model config for some families and spells a few of its fields in ways of its own, or fills
them with a constant whatever the source says. Sources: the providers of Megatron-Bridge 0.3.1 to 0.6.2, and the
run_config.yaml files they write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from converters.errors import UsageError
from converters.rows.expr import Value

Fields = dict[str, Value]
Node = Mapping[str, object]

#: A field of providers since 0.4: where it stands, windows mean what Megatron Core means by them.
SINCE_0_4 = "yarn_rotary_scaling_factor"


def settled(model: Node, config: Fields) -> Fields:
    """`config`, read from a run_config's `model` node as it stands, as the provider that wrote it means it."""
    out = dict(config)
    if out.get("multi_latent_attention"):
        out.pop("kv_channels", None)  # filled in, and used by no part of latent attention
    if out.get("softmax_type") == "learnable" and SINCE_0_4 not in model and out.get("window_size") == _GPT_OSS_WINDOW:
        del out["window_size"]
    if out.get("moe_router_score_function") == "sigmoid":
        out.pop("moe_router_pre_softmax", None)  # of a softmax, which such a router has not
    if out.get("model.position_embedding_type") != "yarn" or SINCE_0_4 not in model:
        out = {field: value for field, value in out.items() if not field.startswith("yarn_")}
    if out.get("model.position_embedding_type") == "mrope":  # rope, by three positions of which a text's are one
        out["model.position_embedding_type"] = "rope"
        sections = model.get("mrope_section")
        if isinstance(sections, list) and sections not in _MROPE_SECTIONS:
            out["mrope_section"] = sections
        else:
            out.pop("mrope_section", None)
    provider = str(model.get("_target_")).rpartition(".")[2]
    for part, (settle, _) in _PROVIDERS.items():
        if part in provider:
            settle(model, out)
    return out


def respelt(provider: str, config: Mapping[str, Value]) -> Fields:
    """Fields of a `model` node that `provider` (its class's dotted name) wants otherwise than Megatron Core does."""
    out: Fields = {}
    name = provider.rpartition(".")[2]
    for part, (_, respell) in _PROVIDERS.items():
        if part in name:
            out |= respell(config)
    return out


_GEMMA3_PATTERN = [5, 1]
#: What 0.3 gives every gpt-oss, whatever its config says: a constant, and so no statement about the checkpoint.
_GPT_OSS_WINDOW = [128, 0]
#: What Bridge gives every Qwen2.5-VL and every GLM-4.5V, likewise.
_MROPE_SECTIONS = ([16, 24, 24], [8, 12, 12])


def _gemma2(model: Node, out: Fields) -> None:
    """Its attention class takes the scale and the layers with a window from fields that only it has."""
    scalar = model.get("query_pre_attn_scalar")
    if isinstance(scalar, int | float) and scalar > 0:
        out["softmax_scale"] = float(scalar) ** -0.5
    out["window_attn_skip_freq"] = 2
    _mistral(model, out)
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = model.get(field)
        if isinstance(value, int | float):
            out[field] = value


def _to_gemma2(config: Mapping[str, Value]) -> Fields:
    scale = config.get("softmax_scale")
    scalar = round(1.0 / scale**2, 6) if isinstance(scale, int | float) and scale > 0 else None
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    out: Fields = {"softmax_scale": None, "window_attn_skip_freq": None, **{cap: config.get(cap) for cap in caps}}
    whole = scalar is not None and scalar == int(scalar)
    return {**out, "query_pre_attn_scalar": int(scalar) if whole and scalar is not None else scalar}


def _mistral(model: Node, out: Fields) -> None:
    """0.3 wrote the window's width where Megatron Core takes how far back."""
    if SINCE_0_4 not in model:
        out["window_size"] = _window(model.get("window_size"))


def _gemma3(model: Node, out: Fields) -> None:
    """A pair of rotary bases (windowed layers, others), a factor for the others, and a window as one number.

    Its layer spec always norms queries and keys. Five layers of six have a window, a constant.
    """
    bases = model.get("rotary_base")
    if isinstance(bases, list) and len(bases) == 2:
        out["model.rotary_base_local"], out["model.rotary_base"] = bases
    factor = model.get("rope_scaling_factor")
    if isinstance(factor, int | float) and factor != 1:
        out["model.seq_len_interpolation_factor"] = factor
    out["qk_layernorm"] = True
    out["window_size"] = _window(model.get("window_size"))
    out.pop("window_attn_skip_freq", None)
    pattern = model.get("interleaved_attn_pattern")
    if isinstance(pattern, list) and len(pattern) == 2 and pattern != _GEMMA3_PATTERN:
        out["window_attn_skip_freq"] = sum(pattern)


def _to_gemma3(config: Mapping[str, Value]) -> Fields:
    window, freq = config.get("window_size"), config.get("window_attn_skip_freq")
    period = freq.index(0) + 1 if isinstance(freq, list) and 0 in freq else freq
    return {
        "rotary_base": [config.get("model.rotary_base_local"), config.get("model.rotary_base")],
        "rope_scaling_factor": config.get("model.seq_len_interpolation_factor") or 1.0,
        "seq_len_interpolation_factor": None,
        "window_size": window[0] + 1 if isinstance(window, list) and isinstance(window[0], int) else None,
        "window_attn_skip_freq": None,
        "interleaved_attn_pattern": [period - 1, 1] if isinstance(period, int) else _GEMMA3_PATTERN,
    }


#: Fields of the model that are Gemma 4's windowed layers' own, and where those of the full layers are.
_OF_FULL = {"kv_channels": "global_head_dim", "num_query_groups": "num_global_key_value_heads"}


def _gemma4(model: Node, out: Fields) -> None:
    """Bases and window as Gemma 3's; which layers are windowed it does not say. Only where keys are values do full
    layers have a number of key heads of their own."""
    _gemma3(model, out)
    for field, full in _OF_FULL.items():
        out[f"windowed_{field}"] = out.get(field)
        size = model.get(full) if field == "kv_channels" or model.get("attention_k_eq_v") else None
        if isinstance(size, int):
            out[field] = size


def _window(value: object) -> Value:
    """The window as Megatron Core has it, of one that is given by its width."""
    width = value[0] if isinstance(value, list) and value else value
    return [width - 1, 0] if isinstance(width, int) and width > 0 else None


def _hybrid(model: Node, out: Fields) -> None:
    """A pattern of layers; behind each slash that of a prediction block, and at each bar a pipeline stage ends."""
    out["model.mcore_model"] = "hybrid"
    pattern = model.get("hybrid_layer_pattern") or model.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        layers, *blocks = pattern.replace("|", "").split("/")
        out["model.hybrid_override_pattern"] = layers
        if blocks:
            out["model.mtp_num_layers"], out["model.mtp_hybrid_override_pattern"] = len(blocks), blocks[0]
    out.pop("mtp_num_layers", None)
    if out.get("model.position_embedding_type") == "none":
        for field in ("model.rotary_base", "model.rotary_percent", "model.seq_len_interpolation_factor"):
            out.pop(field, None)


def _to_hybrid(config: Mapping[str, Value]) -> Fields:
    """The older name of the pattern: every release takes it, and puts a prediction block's behind it."""
    return {
        "is_hybrid_model": True,
        "hybrid_override_pattern": config.get("model.hybrid_override_pattern"),
        "mtp_num_layers": config.get("model.mtp_num_layers"),
        "mtp_hybrid_override_pattern": config.get("model.mtp_hybrid_override_pattern"),
        "position_embedding_type": "none",
    }


def _heterogeneous(model: Node, out: Fields) -> None:
    """The source's whole config.json, of which the layers are what Megatron Core reads."""
    text = model.get("heterogeneous_layers_config_encoded_json")
    if not isinstance(text, str) or not text:
        return
    try:
        layers = json.loads(text)["block_configs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"run_config.yaml: `heterogeneous_layers_config_encoded_json` has no `block_configs`: {error}"
        ) from error
    out |= {"heterogeneous_block_specs": True, "block_configs": layers}
    for field in ("ffn_hidden_size", "num_query_groups"):  # of no layer: each says its own
        out.pop(field, None)


def _to_heterogeneous(config: Mapping[str, Value]) -> Fields:
    """Sizes of no layer stand for all, as the class demands some."""
    text = json.dumps({"block_configs": config.get("block_configs")})
    sizes: Fields = {
        "ffn_hidden_size": config.get("hidden_size"),
        "num_query_groups": config.get("num_attention_heads"),
    }
    return {**sizes, "heterogeneous_layers_config_encoded_json": text}


_Settle = Callable[[Node, Fields], None]
_Respell = Callable[[Mapping[str, Value]], Fields]
#: Part of a provider's class name → what its fields mean, and what it has to be told.
_PROVIDERS: Mapping[str, tuple[_Settle, _Respell]] = {
    "Gemma2Model": (_gemma2, _to_gemma2),
    "Gemma3Model": (_gemma3, _to_gemma3),
    "Gemma3VLModel": (_gemma3, _to_gemma3),
    "Gemma4Model": (_gemma4, lambda _: {}),
    "MistralModel": (_mistral, lambda _: {}),
    "Mamba": (_hybrid, _to_hybrid),
    "NemotronHModel": (_hybrid, _to_hybrid),
    "NemotronHeterogeneous": (_heterogeneous, _to_heterogeneous),
    "HybridModel": (_hybrid, _to_hybrid),
}
