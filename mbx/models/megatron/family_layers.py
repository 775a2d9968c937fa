"""What families change in the spec of a Megatron Core layer: where norms stand and what they span, rotary bases, …

Like `local_modules` this file imports torch and megatron when imported. The norms take the checkpoint names that
Megatron-Bridge gives them: `self_attention.linear_proj.post_layernorm`, `mlp.linear_fc2.post_layernorm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from converters.errors import UnsupportedError
from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.groups import mappings, parallel_state, set_tensor_model_parallel_attributes
from mbx.models.megatron.core.layers import (
    IdentityOp,
    MLASelfAttention,
    ModuleSpec,
    SelfAttention,
    mlp_submodules,
    without_norm,
)
from mbx.models.megatron.core.sharding import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint


def add_post_layernorms(layer: ModuleSpec, norm: Callable[..., nn.Module]) -> None:
    """Put a norm behind attention and behind the MLP of a dense `layer`, before the residual is added.

    Raises UnsupportedError for a layer of experts, whose outputs are summed before such a norm.
    """
    mlp = mlp_submodules(layer)
    if getattr(mlp, "linear_fc2", None) is None:
        raise UnsupportedError("a norm behind the MLP is built for dense layers only, this one holds experts")
    add_norm_behind_attention(layer, norm)
    mlp.linear_fc2 = _normed(mlp.linear_fc2, norm)


def add_norm_behind_attention(layer: ModuleSpec, norm: Callable[..., nn.Module]) -> None:
    """Put a norm behind attention, before the residual is added."""
    attention = layer.submodules.self_attention.submodules
    attention.linear_proj = _normed(attention.linear_proj, norm)


def _normed(linear: type[nn.Module], norm: Callable[..., nn.Module]) -> type[nn.Module]:
    """`linear` followed by `norm`; its bias, if any, is added before."""

    class PostNormLinear(linear):  # type: ignore[misc, valid-type]  # the base is Megatron Core's own choice
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords: Any) -> None:
            super().__init__(input_size, output_size, config=config, **keywords)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            """x: [s, b, input_size] → [s, b, output_size]"""
            return self.behind(*self.product(x))

        def product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            """The linear alone, with the bias that it leaves to others."""
            output, bias = super().forward(x)
            return output, bias

        def behind(self, output: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, None]:
            """What follows the product, an adapter's as well."""
            return self.post_layernorm(output if bias is None else output + bias), None

    return PostNormLinear


def drop_pre_layernorms(layer: ModuleSpec) -> None:
    """Take the norms before attention and before the MLP out of a dense `layer`, modules or fused into a linear."""
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    for holder, name in ((parts.self_attention.submodules, "linear_qkv"), (mlp_submodules(layer), "linear_fc1")):
        linear = getattr(holder, name, None)
        if linear is None:
            raise UnsupportedError("layers without a norm before the MLP are built dense, this one holds experts")
        setattr(holder, name, without_norm(linear))


class NormOverHeads(nn.Module):
    """RMSNorm over all heads of a token at once, which tensor parallelism cuts: squares are summed over its ranks.

    Built as Megatron Core builds the norm of one head, whose width `hidden_size` is; `field` counts the heads.
    """

    field = ""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        heads, ranks = getattr(config, self.field), parallel_state.get_tensor_model_parallel_world_size()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError("norms over all heads are RMSNorm with a plain gamma")
        if heads % ranks:
            raise ValueError(f"tensor parallelism of {ranks} repeats heads, {self.field} is {heads}")
        self.eps, self.width = eps, heads * hidden_size
        self.weight = nn.Parameter(torch.ones(self.width // ranks, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [s, b, heads / tp, d] → the same; statistics and scale in fp32, result in x's dtype."""
        wide, group = x.flatten(-2).float(), parallel_state.get_tensor_model_parallel_group()
        squares = wide.square().sum(-1, keepdim=True)
        # every rank's output depends on the sum, so its gradient is summed as well
        reduced = mappings.reduce_from_tensor_model_parallel_region(squares, group)
        mean = mappings.copy_to_tensor_model_parallel_region(reduced, group) / self.width
        return (wide * torch.rsqrt(mean + self.eps) * self.weight.float()).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, object]:
        """The weight, cut as the heads are."""
        known = ensure_metadata_has_dp_cp_group(metadata)
        made: dict[str, object] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=known["dp_cp_group"],
        )
        return made


class QueryNorm(NormOverHeads):
    """Of the queries."""

    field = "num_attention_heads"


class KeyNorm(NormOverHeads):
    """Of the keys, which are fewer where queries share them."""

    field = "num_query_groups"


def norm_over_heads(layer: ModuleSpec) -> None:
    """Make `layer` norm queries and keys over all heads; UnsupportedError where it attends otherwise."""
    attention = layer.submodules.self_attention
    if attention.module is not SelfAttention:
        raise UnsupportedError(f"norms over heads are built for SelfAttention, not for {attention.module.__name__}")
    attention.submodules.q_layernorm, attention.submodules.k_layernorm = QueryNorm, KeyNorm


class PlainQueryAttention(MLASelfAttention):  # type: ignore[misc]  # megatron is untyped
    """Latent attention whose queries are projected at once (DeepSeek-V2-Lite): no norm stands before or in them.

    Megatron Core 0.19 fuses one into that projection under `qk_layernorm`, on top of the layer's own; before, it built
    none, and no Hugging Face model has one.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, object]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) or IdentityOp for name in names}


def project_queries_at_once(layer: ModuleSpec) -> None:
    """Make `layer` attend by `PlainQueryAttention`."""
    attention = layer.submodules.self_attention
    if attention.module is not MLASelfAttention:
        raise UnsupportedError(f"queries without a norm are built for MLA, not for {attention.module.__name__}")
    attention.module = PlainQueryAttention
    attention.submodules.q_layernorm = IdentityOp


def set_latent_epsilon(model: nn.Module, epsilon: float) -> None:
    """Give the norms of latent queries, keys and values an epsilon of their own; Megatron Core has one for all.

    They are modules of the attention in the local spec, and part of the projection behind them in Transformer
    Engine's.
    """
    for name, module in model.named_modules():
        part = name.rpartition(".")[2]
        if part in _LATENT_NORMS and hasattr(module, "eps"):
            module.eps = epsilon


_LATENT_NORMS = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")
