"""Frozen experts of one rank as one product: no wait for the processor, no launch expert by expert.

Megatron Core's dispatcher counts the tokens of each expert on the processor, and Transformer Engine's grouped linear
starts a product for each of them. Here Transformer Engine's kernels sort the tokens, the counts stay on the GPU, and
PyTorch's grouped product takes them from there. This file imports torch and megatron when it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import nn


@dataclass(frozen=True, slots=True)
class Ends:
    """Where each expert's tokens end among those of all: int32 [experts], on their device."""

    at: torch.Tensor

    def tolist(self) -> Ends:
        """Itself: Megatron Core's experts ask for a list and hand it on to their linears."""
        return self


def grouped(x: torch.Tensor, weights: torch.Tensor, ends: Ends) -> torch.Tensor:
    """Each expert's own rows of x times its own weight, transposed. x: [tokens, in], weights: [experts, out, in]."""
    return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends.at)


def join_experts(model: nn.Module) -> None:
    """Let every layer of grouped experts, which are frozen, without biases and all on this rank, be one product."""
    for layer in [module for module in model.modules() if isinstance(module, MoELayer)]:
        dispatcher, experts = layer.token_dispatcher, layer.experts
        assert isinstance(dispatcher, MoEAllGatherTokenDispatcher) and isinstance(experts, TEGroupedMLP)
        dispatcher.dispatch_postprocess = partial(_sort, dispatcher)
        dispatcher.combine_preprocess = partial(_restore, dispatcher)
        for linear in (experts.linear_fc1, experts.linear_fc2):
            linear.forward = partial(_product, linear, _stacked(linear))


def _stacked(linear: Any) -> torch.Tensor:
    """The weights of a grouped linear as one [experts, out, in]; its parameters become views of that."""
    owned = [linear.get_parameter(f"weight{expert}") for expert in range(linear.num_gemms)]
    stacked = torch.stack([weight.detach() for weight in owned])
    for weight, view in zip(owned, stacked, strict=True):
        weight.data = view
    return stacked


def _product(linear: Any, stacked: torch.Tensor, x: torch.Tensor, ends: Ends) -> tuple[torch.Tensor, None]:
    if linear.weight0.data_ptr() != stacked.data_ptr():  # what is loaded into the parameters would not be multiplied
        raise RuntimeError("the experts' parameters were moved since they were joined")
    return grouped(x, stacked, ends), None


def _sort(dispatcher: Any, states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, Ends, torch.Tensor]:
    """Each token once for each of its experts, expert by expert: states [tokens, h], probs [tokens, experts]."""
    routed = dispatcher.routing_map
    dispatcher.hidden_shape_before_permute = states.shape
    count = routed.shape[0] * dispatcher.config.moe_router_topk
    tokens, chosen, dispatcher.reversed_local_input_permutation_mapping = permute(
        states, routed, probs=probs, num_out_tokens=count, fused=True
    )
    dispatcher.routing_map = None
    return tokens, Ends(routed.sum(dim=0).cumsum(0).to(torch.int32)), chosen


def _restore(dispatcher: Any, states: torch.Tensor) -> torch.Tensor:
    """The sum of each token's outputs, in the order in which they came."""
    restored: torch.Tensor = unpermute(
        states,
        dispatcher.reversed_local_input_permutation_mapping,
        restore_shape=dispatcher.hidden_shape_before_permute,
        fused=True,
    )
    return restored
