"""What single provider classes of Megatron-Bridge mean by their fields, in Megatron Core's terms.

Bridge subclasses the model config for some families and spells a few of its fields in ways of its own, or fills
them with a constant whatever the source says. Source: the providers of Megatron-Bridge 0.3.1, and the run_config.yaml
files they write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from converters.errors import UsageError
from converters.rows.expr import Value

Fields = dict[str, Value]


def settled(model: Mapping[str, object], config: Fields) -> Fields:
    """`config`, read from a run_config's `model` node as it stands, as the provider that wrote it means it."""
    out = dict(config)
    if out.get("multi_latent_attention"):
        out.pop("kv_channels", None)  # filled in, and used by no part of latent attention
    if out.get("softmax_type") == "learnable" and out.get("window_size") == _GPT_OSS_WINDOW:
        del out["window_size"]
    if out.get("moe_router_score_function") == "sigmoid":
        out.pop("moe_router_pre_softmax", None)  # of a softmax, which such a router has not
    provider = str(model.get("_target_")).rpartition(".")[2]
    for part, settle in _PROVIDERS.items():
        if part in provider:
            settle(model, out)
    return out


#: What every gpt-oss gets, whatever its config says: a constant, and so no statement about the checkpoint.
_GPT_OSS_WINDOW = [128, 0]


def _gemma2(model: Mapping[str, object], out: Fields) -> None:
    """Its attention class takes the scale and the layers with a window from fields that only it has."""
    scalar = model.get("query_pre_attn_scalar")
    if isinstance(scalar, int | float) and scalar > 0:
        out["softmax_scale"] = float(scalar) ** -0.5
    out["window_attn_skip_freq"] = 2
    out["window_size"] = _window(model.get("window_size"))
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = model.get(field)
        if isinstance(value, int | float):
            out[field] = value


def _gemma3(model: Mapping[str, object], out: Fields) -> None:
    """A pair of rotary bases (windowed layers, others), and a window as one number.

    Its layer spec always norms queries and keys. `interleaved_attn_pattern` is a constant, as is gpt-oss's window.
    """
    bases = model.get("rotary_base")
    if isinstance(bases, list) and len(bases) == 2:
        out["model.rotary_base_local"], out["model.rotary_base"] = bases
    out["qk_layernorm"] = True
    out["window_size"] = _window(model.get("window_size"))
    out.pop("window_attn_skip_freq", None)


def _window(value: object) -> Value:
    """The window as Megatron Core has it; these classes take its width where Megatron Core takes how far back."""
    width = value[0] if isinstance(value, list) and value else value
    return [width - 1, 0] if isinstance(width, int) and width > 0 else None


def _hybrid(model: Mapping[str, object], out: Fields) -> None:
    out["model.mcore_model"] = "hybrid"
    pattern = model.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        out["model.hybrid_override_pattern"] = pattern
    if out.get("model.position_embedding_type") == "none":
        for field in ("model.rotary_base", "model.rotary_percent", "model.seq_len_interpolation_factor"):
            out.pop(field, None)


def _heterogeneous(model: Mapping[str, object], out: Fields) -> None:
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


#: Part of a provider's class name → what its fields mean.
_PROVIDERS: Mapping[str, Callable[[Mapping[str, object], Fields], None]] = {
    "Gemma2Model": _gemma2,
    "Gemma3Model": _gemma3,
    "Mamba": _hybrid,
    "NemotronHModel": _hybrid,
    "NemotronHeterogeneous": _heterogeneous,
    "HybridModel": _hybrid,
}
