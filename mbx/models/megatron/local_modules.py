"""Modules that stand in for Transformer Engine's where Megatron Core's local spec has none.

This file defines torch modules, so unlike its neighbours it imports torch and megatron when imported; only functions
of `mbx.models.megatron.specs` import it.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn

from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.layers import DotProductAttention, WrappedTorchNorm


class ZeroCenteredNorm(nn.Module):
    """RMSNorm or LayerNorm whose stored weight is gamma − 1, as `layernorm_zero_centered_gamma` means it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.is_rms = config.normalization == "RMSNorm"
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.is_rms else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden]; statistics and scale in fp32, result in x's dtype."""
        wide, gamma = x.float(), self.weight.float() + 1.0
        if self.is_rms:
            out = nn.functional.rms_norm(wide, (wide.shape[-1],), gamma, self.eps)
        else:
            bias = None if self.bias is None else self.bias.float()
            out = nn.functional.layer_norm(wide, (wide.shape[-1],), gamma, bias, self.eps)
        return out.to(x.dtype)


class LocalNorm:
    """The norm the config asks for, without Apex or Transformer Engine: calling the class returns the norm module.

    A class and not a function because Megatron Core takes a function in a spec for the layer itself. The keyword
    arguments mcore passes on top (`persist_layer_norm`, `zero_centered_gamma`, `normalization`) repeat config fields.
    Under sequence parallelism the parameters are marked, as Transformer Engine marks its norms': each rank sees its
    tokens, so gradients are summed. mcore refuses torch's norms there, which know nothing of that.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_repeated: bool | str
    ) -> nn.Module:
        norm: nn.Module
        if config.layernorm_zero_centered_gamma:
            norm = ZeroCenteredNorm(config, hidden_size, eps)
        else:
            alone = copy(config)
            alone.sequence_parallel = False
            # torch builds its norms in the default dtype; every other parameter of the model is in params_dtype.
            norm = WrappedTorchNorm(alone, hidden_size, eps).to(config.params_dtype)
        if config.sequence_parallel:
            for parameter in norm.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return norm


class NarrowDotProductAttention(DotProductAttention):  # type: ignore[misc]  # megatron is untyped
    """Unfused attention whose keys and values differ in width; mcore's own takes no `k_channels` and `v_channels`."""

    def __init__(
        self, *arguments: Any, k_channels: int | None = None, v_channels: int | None = None, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        del k_channels  # only the width of the output depends on a channel count, and that is the values'
        if v_channels is not None:
            self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels


class LatentDotProductAttention(NarrowDotProductAttention):
    """The same as multi-latent attention needs it, which does not build with the local spec of 0.16.1."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        # MLA has one key and value head per query head, whatever num_query_groups says.
        self.num_query_groups_per_partition = self.num_attention_heads_per_partition
