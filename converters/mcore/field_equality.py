"""Whether two Megatron Core configs say the same by a field, in whatever words."""

from __future__ import annotations

from collections.abc import Mapping

from converters.rows.expr import Value

#: What a field says when a model does not use it.
NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "softmax_type": ("vanilla",),
    "glu_linear_offset": (0.0,),
    "moe_layer_freq": (1,),
    "moe_router_pre_softmax": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (1,),
    "moe_router_group_topk": (1,),
    "model.rotary_percent": (1.0,),
    "model.rope_scaling_factor": (8.0,),
    "rope_type": ("rope", "yarn"),
    "dsa_indexer_topk_freq": (1,),
    "model.mcore_model": ("gpt",),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1.0,)),
}
#: Fields that say "every n-th layer" by one number, and whether such a layer is marked 1: the others are then 0.
_PATTERNS = {"moe_layer_freq": True, "window_attn_skip_freq": False, "linear_attention_freq": False}


def alike(name: str, mine: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    """Whether two configs of which one states only some fields say the same by `name`, or that it is not used."""
    layers = mine.get("num_layers")
    left, right = (listed(name, side[name], layers if isinstance(layers, int) else 0) for side in (mine, other))
    if name == "rope_type" and any(side.get("rotary_scaling_factor") != 1 for side in (mine, other)):
        return left == right  # YaRN is plain rotation at factor 1 alone
    neutral = (*NEUTRAL.get(name, ()), None)
    return left == right or (not left and not right) or (left in neutral and right in neutral)


def listed(name: str, value: Value, layers: int) -> Value:
    """A field's number for every so many layers as a list of `layers` flags; other values as they are.

    Source: `get_moe_layer_pattern` and `get_linear_attention_pattern` in Megatron Core's layer specs, and its
    `is_layer_window_attention`. Sizes below 1 describe no pattern and stay as they are.
    """
    if name not in _PATTERNS or isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return value
    if _PATTERNS[name]:
        return [int(layer % value == 0) for layer in range(layers)]
    return [int((layer + 1) % value != 0) for layer in range(layers)]


def is_idle(name: str, value: Value) -> bool:
    """Whether a field says that a model has no use of it, as a writer does that leaves the field out."""
    return not value or value in NEUTRAL.get(name, ())
