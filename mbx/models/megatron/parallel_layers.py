"""Layers whose attention and MLP read the same input: `x + attention(norm(x)) + mlp(norm(x))` (GPT-NeoX, Cohere 2).

Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from converters.errors import UnsupportedError
from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.layers import IdentityOp, ModuleSpec, TransformerLayer, mlp_submodules, without_norm


class ParallelLayer(TransformerLayer):  # type: ignore[misc]  # megatron is untyped
    """A layer of which the MLP reads what attention reads, and is added to what attention has added.

    Megatron Core's own forward runs: the MLP is given the layer's input, and its residual is attention's output.
    """

    def _forward_attention(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        """hidden_states: [s, b, hidden] → the same, for the MLP, and the context."""
        attended, context = super()._forward_attention(hidden_states, *arguments, **keywords)
        self.__dict__["attended"] = attended
        return hidden_states, context

    def _forward_post_mlp(self, output: Any, residual: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        return super()._forward_post_mlp(output, self.__dict__.pop("attended"), *arguments, **keywords)


class OneNormLayer(ParallelLayer):
    """The same with one norm for both, which stays a module of the layer whichever spec builds it."""

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> Any:
        return self.input_layernorm(hidden_states)


class WeightedLayerNorm(nn.Module):
    """LayerNorm without a bias (Cohere: `Cohere2LayerNorm`), built as Megatron Core builds its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_repeated: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # as Megatron Core marks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden]; statistics and scale in fp32, result in x's dtype."""
        return nn.functional.layer_norm(x.float(), x.shape[-1:], self.weight.float(), None, self.eps).to(x.dtype)


def read_the_same(layer: ModuleSpec, *, one_norm: bool) -> None:
    """Make `layer` a `ParallelLayer`, or a `OneNormLayer`; UnsupportedError where it is of another class."""
    if layer.module is not TransformerLayer:
        raise UnsupportedError(f"parallel residuals are built for TransformerLayer, not for {layer.module.__name__}")
    layer.module = ParallelLayer
    if not one_norm:
        return
    parts, mlp = layer.submodules, mlp_submodules(layer)
    if getattr(mlp, "linear_fc1", None) is None:
        raise UnsupportedError("a norm for attention and MLP is built for dense layers only, this one holds experts")
    layer.module = OneNormLayer
    parts.input_layernorm, parts.pre_mlp_layernorm = WeightedLayerNorm, IdentityOp
    attention = parts.self_attention.submodules
    attention.linear_qkv, mlp.linear_fc1 = without_norm(attention.linear_qkv), without_norm(mlp.linear_fc1)
    # as Transformer Engine's fused one, which is attention's alone
    parts.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
