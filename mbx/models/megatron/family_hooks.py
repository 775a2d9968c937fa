"""What families multiply and cap on the way through a Megatron Core model, as hooks on a built one.

Hooks stand on modules whose meaning no spec, no adapter and no release changes: the embedding, a layer's attention
and MLP before the residual is added, the attention proper, the output layer. Each names Transformers' formula.
Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from converters.errors import UnsupportedError, UsageError
from mbx.models.megatron.clamped import clamp_halves
from mbx.models.megatron.config import MODEL_PREFIX, FlatConfig, number
from mbx.models.megatron.core.layers import DotProductAttention
from mbx.models.megatron.rotary import turn_a_share
from mbx.models.megatron.routers import score_by_softmax


def add_family_hooks(model: nn.Module, config: FlatConfig) -> None:
    """Hook up what the flat `config` of `model` asks for beyond Megatron Core; a stage without the part is left alone.

    UsageError for a factor that is no number, UnsupportedError where a kernel leaves no place for it.
    """
    decoder = cast("Any", model).decoder
    if config.get(MODEL_PREFIX + "scale_embeddings"):
        _scale_embedding(model, cast("int", config["hidden_size"]) ** 0.5, rounded=True)
    if (factor := number(config, "embedding_multiplier")) is not None:
        _scale_embedding(model, factor, rounded=False)
    if config.get(MODEL_PREFIX + "biased_softmax_router"):
        score_by_softmax(decoder.layers)
    if (factor := number(config, "residual_multiplier")) is not None:
        for layer in decoder.layers:
            for branch in (layer.self_attention, layer.mlp):
                branch.register_forward_hook(_Scaled(factor))
    if (cap := number(config, "attn_logit_softcapping")) is not None:
        for layer in decoder.layers:
            _softmax_of(layer.self_attention).register_forward_pre_hook(_Capped(cap))
    if (beta := number(config, "llama_4_scaling_beta")) is not None:
        length = number(config, "yarn_original_max_position_embeddings")
        if length is None:
            raise UsageError("`llama_4_scaling_beta` needs `yarn_original_max_position_embeddings`")
        _scale_queries(model, beta, length)
    if (share := number(config, "rope_proportion")) is not None:
        turn_a_share(model, share)
    clamp_halves(decoder.layers, config)
    _hook_logits(model, config)


def _hook_logits(model: nn.Module, config: FlatConfig) -> None:
    """Scale and cap what comes out of the output layer; UnsupportedError where a fused loss never holds logits."""
    divisor, cap = number(config, "logits_scaling"), number(config, "final_logit_softcapping")
    for field in ("logit_scale", "lm_head_multiplier"):  # Cohere and Falcon-H1 multiply where Granite divides
        if (scale := number(config, field)) is not None:
            divisor = 1.0 / scale
    if (output := getattr(model, "output_layer", None)) is not None and (divisor is not None or cap is not None):
        if getattr(cast("Any", model).config, "cross_entropy_fusion_impl", None) == "linear":
            raise UnsupportedError("logits are scaled or capped, which cross_entropy_fusion_impl=linear never holds")
        output.register_forward_hook(_Logits(divisor or 1.0, cap))


def _scale_embedding(model: nn.Module, factor: float, *, rounded: bool) -> None:
    """Multiply the token embeddings by `factor`, itself `rounded` to their dtype first where the class does so.

    Gemma rounds √hidden_size (`embed_scale`), Granite multiplies by a Python float.
    """

    def scale(module: nn.Module, arguments: object, embedded: torch.Tensor) -> torch.Tensor:
        del module, arguments
        if rounded:
            return embedded * embedded.new_full((), factor)  # filled where it is: a copy from the CPU is not recorded
        return embedded * factor

    if (embedding := getattr(model, "embedding", None)) is not None:
        embedding.register_forward_hook(scale)


class _Scaled:
    """A sublayer's output times a constant, before the residual is added (Granite: `residual_multiplier`)."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, arguments: object, found: Any) -> Any:
        output, bias = found
        return output * self.factor, None if bias is None else bias * self.factor


class _Capped:
    """Scores `[b, heads, s, s]` become cap · tanh(scores / cap) before the mask (Gemma 2: eager attention)."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        scores, *rest = given
        return torch.tanh(scores / self.cap) * self.cap, *rest


class _Logits:
    """Logits over a constant, then capped (Granite: `logits_scaling`; Gemma 2: `final_logit_softcapping`)."""

    def __init__(self, divisor: float, cap: float | None) -> None:
        self.divisor, self.cap = divisor, cap

    def __call__(self, module: nn.Module, arguments: object, found: Any) -> Any:
        logits, bias = found
        logits = logits if self.divisor == 1.0 else logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap, bias


def _softmax_of(attention: Any) -> nn.Module:
    """Where an attention's scores are masked; UnsupportedError for a kernel that never shows them."""
    if not isinstance(core := attention.core_attention, DotProductAttention):
        raise UnsupportedError(f"scores are capped in Megatron Core's own attention, not in {type(core).__name__}")
    core.scale_mask_softmax.scaled_masked_softmax_fusion = False  # Apex's kernel
    return cast("nn.Module", core.scale_mask_softmax)


def _scale_queries(model: nn.Module, beta: float, length: float) -> None:
    """Multiply a query at position p by 1 + beta · log(1 + ⌊p / length⌋) (Ministral 3: `get_llama_4_attn_scale`).

    Positions are the `position_ids` that every pipeline stage is given: this rank's part of them under context
    parallelism, each example's own in a packed row. A layer that is recomputed reads those of the last pass.
    """
    scales: list[torch.Tensor] = []

    def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        places = named.get("position_ids", given[1] if len(given) > 1 else None)
        if places is None:
            raise UsageError("queries are scaled by position: the model must be called with `position_ids`")
        scales[:] = [1 + beta * torch.log1p(torch.floor(places.float() / length))]

    def scale(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        query, *rest = given
        each = scales[0].transpose(0, 1).to(query.dtype)  # [s, b]; a packed row's queries are [s, heads, d]
        return query * (each[..., None, None] if query.dim() == 4 else each[..., None]), *rest

    model.register_forward_pre_hook(keep, with_kwargs=True)
    for layer in cast("Any", model).decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(scale)
