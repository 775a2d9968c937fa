"""Experts of Gemma 4: beside an MLP, each behind norms of its own, chosen by scores of what comes before any norm.

Formulas are those of Transformers' `Gemma4TextDecoderLayer` and `Gemma4TextRouter`; parameters have the names that
Megatron-Bridge gives them. Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn

from mbx.models.megatron.core.layers import MoELayer
from mbx.models.megatron.local_modules import LocalNorm

#: Norms that are modules of the experts here and of the layer in the checkpoint.
NORMS = {
    f"mlp.{name}.": f"{name}." for name in ("pre_mlp_layernorm", "pre_shared_expert_layernorm", "post_ffn_layernorm")
}
_INNER = ("post_shared_expert_layernorm", "post_moe_layernorm")


class Gemma4Experts(MoELayer):  # type: ignore[misc]  # megatron is untyped
    """An MLP and experts, which read what the layer's own norm has not touched, and whose sum is normed."""

    @classmethod
    def become(cls, experts: Any) -> None:
        """Make a built MoELayer one of these: Megatron Core hands process groups to its own class alone."""
        config = experts.config
        size, epsilon, dtype = config.hidden_size, config.layernorm_epsilon, config.params_dtype
        for name in (*(name.split(".")[1] for name in NORMS), *_INNER):
            setattr(experts, name, LocalNorm(config, size, epsilon))
        # A softmax over all whose chosen shares are made to sum to 1 is one over the chosen.
        experts.router.config = copy(config)
        experts.router.config.moe_router_pre_softmax = False
        experts.router.scale = nn.Parameter(torch.ones(size, dtype=dtype))
        experts.router.per_expert_scale = nn.Parameter(torch.ones(config.num_moe_experts, dtype=dtype))
        experts.__class__ = cls

    def route(
        self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[s, b, hidden] → each token's share of each expert and whether it is chosen, [s · b, experts]"""
        size, epsilon = self.config.hidden_size, self.config.layernorm_epsilon
        normed = nn.functional.rms_norm(hidden_states.float(), (size,), None, epsilon).to(hidden_states.dtype)
        probs, chosen = super().route(normed * self.router.scale * size**-0.5, *arguments, **keywords)
        return probs * self.router.per_expert_scale, chosen

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[s, b, hidden] → the MLP's output, normed."""
        found = super().shared_experts_compute(self.pre_shared_expert_layernorm(hidden_states))
        normed: torch.Tensor = self.post_shared_expert_layernorm(found)
        return normed

    def preprocess(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        """[s, b, hidden] → what is sent to the experts."""
        return super().preprocess(self.pre_mlp_layernorm(hidden_states), *arguments, **keywords)

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor) -> torch.Tensor:
        """What comes back from the experts, and the MLP's output [s, b, hidden] → their sum, normed."""
        routed = self.post_moe_layernorm(super().postprocess(output, None))
        both: torch.Tensor = self.post_ffn_layernorm(routed + shared_expert_output)
        return both
