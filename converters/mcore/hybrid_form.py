"""The two forms of one transformer: Megatron Core's GPTModel, and HybridModel, whose layers are halves of its layers.

Layer L of a GPTModel is positions 2L (`*`, attention) and 2L + 1 (`-`, MLP, or `E`, experts) of a HybridModel. The
keys of that are never stacked, its last norm has another name, and a prediction head's layer is a stack of its own.
Sources: dist_checkpointing/gpt_checkpoint_interop.py and models/hybrid/ of megatron-core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from converters.errors import StorageError, UnsupportedError
from converters.mcore.field_equality import is_idle
from converters.mcore.keys import parse_key
from converters.mcore.releases import CURRENT, PREDICTION_LAYERS
from converters.rows.expr import Value
from converters.tensors import Shape

ATTENTION, DENSE, EXPERTS = "*", "-", "E"
#: How the parameters of each half of a layer begin.
_HALVES = (("self_attention.", "input_layernorm."), ("mlp.", "pre_mlp_layernorm."))
_GPT_NORM, _HYBRID_NORM = (f"{CURRENT.final_norm[kind]}." for kind in ("gpt", "hybrid"))
_GPT_HEAD, _HYBRID_HEAD = (CURRENT.prediction_layer[kind] for kind in ("gpt", "hybrid"))
#: Fields that a GPTModel has by layer number, or HybridModel no argument for: with a value, there is one form only.
_GPT_ONLY = """window_attn_skip_freq no_rope_freq linear_attention_freq experimental_attention_variant
heterogeneous_block_specs multi_latent_attention model.rope_scaling model.post_layernorms
model.rotary_base_local model.post_layernorms_only model.qk_layernorm_over_heads model.scale_embeddings
attn_logit_softcapping final_logit_softcapping embedding_multiplier residual_multiplier
logits_scaling logit_scale llama_4_scaling_beta rope_dynamic_factor model.parallel_residual
model.one_layernorm model.biased_softmax_router model.layer_scalars rope_proportion""".split()
#: Fields of a GPTModel that the pattern says, or that mean nothing without one of those above.
_UNUSED = (
    "moe_layer_freq",
    "model.rope_scaling",
    "model.rope_scaling_factor",
    "window_attn_skip_freq",
    "no_rope_freq",
)


def to_hybrid(key: str, index: Shape) -> tuple[str, Shape]:
    """Key and entry of a HybridModel for those of a GPTModel (torch_dist); UnsupportedError for what it has not.

    Law: `from_hybrid` of the key is that of the GPTModel's single layer.
    """
    parsed = parse_key(key)
    if parsed.site == "mtp":
        inner, _, param = parsed.param.partition(".")
        if inner not in PREDICTION_LAYERS:
            return key, index
        return f"mtp.layers.{parsed.layer}.{_HYBRID_HEAD}.layers.{_half(key, param)}.{param}", index
    if parsed.site == "decoder":
        layer, rest = (index[0], index[1:]) if parsed.stacked else (parsed.layer or 0, index)
        return f"decoder.layers.{2 * layer + _half(key, parsed.param)}.{parsed.param}", rest
    return (_HYBRID_NORM + key[len(_GPT_NORM) :] if key.startswith(_GPT_NORM) else key), index


def _half(key: str, param: str) -> int:
    for half, starts in enumerate(_HALVES):
        if param.startswith(starts):
            return half
    raise UnsupportedError(
        f"`{key}` belongs to neither the attention nor the MLP of a layer: HybridModel has no place"
    )


def from_hybrid(key: str) -> str:
    """The key of a GPTModel's single layer for a HybridModel's; only of models that `has_gpt_form` is true of.

    StorageError for a head under the other class's name.
    """
    parsed = parse_key(key)
    if parsed.site == "decoder" and parsed.layer is not None:
        return f"decoder.layers.{parsed.layer // 2}.{parsed.param}"
    if parsed.site == "mtp" and parsed.param.partition(".")[0] in PREDICTION_LAYERS:
        if not parsed.param.startswith(f"{_HYBRID_HEAD}.layers."):
            raise StorageError(f"`{key}`: the head of a HybridModel holds its layers under `{_HYBRID_HEAD}.layers.N.`")
        param = parsed.param.removeprefix(f"{_HYBRID_HEAD}.layers.").partition(".")[2]
        return f"mtp.layers.{parsed.layer}.{_GPT_HEAD}.{param}"
    return _GPT_NORM + key[len(_HYBRID_NORM) :] if key.startswith(_HYBRID_NORM) else key


def has_gpt_form(keys: Collection[str]) -> bool:
    """Whether these keys of a HybridModel are of attention and MLP by turns, from the first layer to the last."""
    if CURRENT.kind_of(keys) != "hybrid":
        return False
    halves: dict[int, set[int]] = {}
    for key in keys:
        parsed = parse_key(key)
        if parsed.site != "decoder":
            continue
        if parsed.layer is None:
            return False
        half = next((half for half, starts in enumerate(_HALVES) if parsed.param.startswith(starts)), -1)
        halves.setdefault(parsed.layer, set()).add(half)
    return len(halves) % 2 == 0 and halves == {layer: {layer % 2} for layer in range(len(halves))} and bool(halves)


def pattern_of(config: Mapping[str, Value]) -> str:
    """The `hybrid_layer_pattern` of a GPTModel's config; UnsupportedError where there is no other form.

    Heads of multi-token prediction follow behind `/`, one a head, each as the last layer is.
    """
    if odd := [name for name in _GPT_ONLY if not is_idle(name, config.get(name))]:
        raise UnsupportedError(
            f"‹model-class› hybrid: `{odd[0]}` is {config[odd[0]]!r}, which HybridModel has no way to say",
            hint="‹model-class› gpt",
        )
    layers, experts, freq = config.get("num_layers"), config.get("num_moe_experts"), config.get("moe_layer_freq", 1)
    if not isinstance(layers, int) or layers < 1:
        raise UnsupportedError("‹model-class› hybrid: nothing says how many layers the model has")
    if isinstance(freq, list):
        marks = [bool(flag) for flag in freq]
    else:
        every = freq if isinstance(freq, int) and freq > 0 else 1
        marks = [layer % every == 0 for layer in range(layers)]
    kinds = [ATTENTION + (EXPERTS if experts and mark else DENSE) for mark in marks]
    heads = config.get("mtp_num_layers")
    return "".join(kinds) + f"/{kinds[-1]}" * (heads if isinstance(heads, int) else 0)


def hybrid_config(config: Mapping[str, Value]) -> dict[str, Value]:
    """A GPTModel's config as its HybridModel has it; raises what `pattern_of` does."""
    pattern = pattern_of(config)
    kept = {name: value for name, value in config.items() if name not in _UNUSED}
    shape: dict[str, Value] = {"num_layers": len(pattern.partition("/")[0]), "model.mcore_model": "hybrid"}
    return {**kept, **shape, "model.hybrid_override_pattern": pattern}


def gpt_args(args: Mapping[str, object]) -> dict[str, object]:
    """Megatron-LM's args of a HybridModel that has a GPTModel's form, as that one's.

    StorageError where they say another pattern than attention and MLP by turns.
    """
    pattern = str(args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern") or "")
    main = pattern.partition("/")[0].replace("|", "")
    kinds = main[1::2]
    if set(main[::2]) - {ATTENTION} or set(kinds) - {DENSE, EXPERTS} or len(main) % 2:
        raise StorageError(
            f"the args say hybrid_layer_pattern {pattern!r}; the tensors are attention and MLP by turns"
        )
    out = {**args, "hybrid_layer_pattern": None, "hybrid_override_pattern": None, "is_hybrid_model": False}
    if kinds:
        out["num_layers"] = len(kinds)
    if args.get("num_experts") and kinds:
        marks = [int(kind == EXPERTS) for kind in kinds]
        out["moe_layer_freq"] = 1 if all(marks) else marks
    return out


def hybrid_args(config: Mapping[str, Value]) -> dict[str, object]:
    """What Megatron-LM's args say otherwise of the HybridModel of a `hybrid_config`."""
    return {
        "num_layers": config["num_layers"],
        "is_hybrid_model": True,
        "hybrid_layer_pattern": config["model.hybrid_override_pattern"],
        "hybrid_override_pattern": None,
        "moe_layer_freq": 1,
    }
