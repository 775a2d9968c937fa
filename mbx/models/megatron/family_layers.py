"""What families add to a Megatron Core layer: norms behind sublayers, scaled embeddings, a second rotary base, …

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
from mbx.models.megatron.core.layers import ModuleSpec, RotaryEmbedding, SelfAttention, is_layer_window_attention


def add_post_layernorms(layer: ModuleSpec, norm: Callable[..., nn.Module]) -> None:
    """Put a norm behind attention and behind the MLP of a dense `layer`, before the residual is added.

    Raises UnsupportedError for a layer of experts, whose outputs are summed before such a norm.
    """
    attention = layer.submodules.self_attention.submodules
    mlp = layer.submodules.mlp
    if getattr(mlp.submodules, "linear_fc2", None) is None:
        raise UnsupportedError("a norm behind the MLP is built for dense layers only, this one holds experts")
    attention.linear_proj = _normed(attention.linear_proj, norm)
    mlp.submodules.linear_fc2 = _normed(mlp.submodules.linear_fc2, norm)


def _normed(linear: type[nn.Module], norm: Callable[..., nn.Module]) -> type[nn.Module]:
    """`linear` followed by `norm`; its bias, if any, is added before."""

    class PostNormLinear(linear):  # type: ignore[misc, valid-type]  # the base is Megatron Core's own choice
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords: Any) -> None:
            super().__init__(input_size, output_size, config=config, **keywords)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            """x: [s, b, input_size] → [s, b, output_size]"""
            output, bias = super().forward(x)
            return self.post_layernorm(output if bias is None else output + bias), None

    return PostNormLinear


class TwoBaseAttention(SelfAttention):  # type: ignore[misc]  # megatron is untyped
    """Self-attention whose windowed layers rotate by a base of their own (Gemma 3: 10000 beside 1000000)."""

    def __init__(self, config: TransformerConfig, *arguments: Any, rotary_base_local: float, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        self.window_rotary: RotaryEmbedding | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number):
            self.window_rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=rotary_base_local,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )

    def forward(self, *arguments: Any, rotary_pos_emb: torch.Tensor | None = None, **keywords: Any) -> Any:
        """As SelfAttention's; `rotary_pos_emb: [s / cp, 1, 1, d]` is replaced in a windowed layer."""
        if self.window_rotary is not None and rotary_pos_emb is not None:
            length = rotary_pos_emb.shape[0] * self.pg_collection.cp.size()
            rotary_pos_emb = self.window_rotary(length, packed_seq=keywords.get("packed_seq_params") is not None)
        return super().forward(*arguments, rotary_pos_emb=rotary_pos_emb, **keywords)


def use_two_bases(layer: ModuleSpec, rotary_base_local: float) -> None:
    """Make `layer` attend by `TwoBaseAttention`; UnsupportedError where it attends otherwise than by SelfAttention."""
    attention = layer.submodules.self_attention
    if attention.module is not SelfAttention:
        raise UnsupportedError(f"a second rotary base is built for SelfAttention, not for {attention.module.__name__}")
    attention.module = TwoBaseAttention
    attention.params = {**(attention.params or {}), "rotary_base_local": rotary_base_local}


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


def scale_embeddings(model: nn.Module, hidden_size: int) -> None:
    """Multiply the token embeddings of a Megatron Core model by √hidden_size, rounded to their dtype first.

    The rounding is Transformers' (Gemma's `embed_scale`). A pipeline stage without embeddings is left alone.
    """

    def scale(module: nn.Module, arguments: object, embedded: torch.Tensor) -> torch.Tensor:
        del module, arguments
        return embedded * torch.tensor(hidden_size**0.5, dtype=embedded.dtype, device=embedded.device)

    if (embedding := getattr(model, "embedding", None)) is not None:
        embedding.register_forward_hook(scale)
