"""The losses of Megatron Core's routers: their weight among tokens, and their sums of a step.

This file imports torch and megatron when it is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

#: What keeps the router's losses: an object since 0.18, a dict of dicts before.
_router_losses: Callable[[], Any] | None = getattr(moe_utils, "get_moe_metrics_tracker", None)
#: Balance losses, as configs name them.
_KINDS = ("aux_loss", "seq_aux_loss", "global_aux_loss")
_ATTACH = TopKRouter.attach_and_log_load_balancing_loss
#: Whether this release (0.19 does, 0.16 does not) weighs a rank's losses by the number of ranks that share a row.
_WEIGHED = "tp_cp_group.size()" in inspect.getsource(_ATTACH)


def weigh_by_row(router: Any) -> None:
    """Let a router's losses weigh as the row does, where several ranks hold parts of it.

    Where gradients are divided by the tokens of a step, Megatron Core multiplies these losses by a rank's own tokens,
    so that a loss which is one for the whole row weighed 1 / ranks of it; 0.19 takes the rank's own times the ranks.
    """
    ranks = router.tp_cp_group.size()
    if ranks == 1 or not router.calculate_per_token_loss:
        return
    router.attach_and_log_load_balancing_loss = partial(_attach, router)
    if not _WEIGHED:
        router.apply_z_loss = partial(_apply_z_loss, router, router.apply_z_loss, ranks)


def _attach(
    router: Any, activation: torch.Tensor, *arguments: Any, valid_token_count: Any = None, **named: Any
) -> torch.Tensor:
    own = activation.shape[0] if valid_token_count is None else valid_token_count
    count = torch.as_tensor(own, dtype=torch.float32, device=activation.device).clone()
    torch.distributed.all_reduce(count, group=router.tp_cp_group)
    if _WEIGHED:
        count /= router.tp_cp_group.size()
    attached: torch.Tensor = _ATTACH(router, activation, *arguments, valid_token_count=count, **named)
    return attached


def _apply_z_loss(
    router: Any, apply: Callable[..., torch.Tensor], ranks: int, logits: torch.Tensor, padding_mask: Any = None
) -> torch.Tensor:
    if router.config.moe_z_loss_coeff is None:
        return logits
    with patch.object(router.config, "moe_z_loss_coeff", router.config.moe_z_loss_coeff * ranks):
        return apply(logits, padding_mask=padding_mask)


def balance(config: Any, models: Sequence[nn.Module], num_micro_batches: int) -> dict[str, float]:
    """The router's losses of a step, and forget them: the mean over all layers, micro-batches and replicas."""
    if not getattr(config, "num_moe_experts", None) or not (names := _names(config)):
        return {}
    tracker = tracked()
    routers = sum(isinstance(module, TopKRouter) for model in models for module in model.modules())
    device = next(models[0].parameters()).device
    sums = torch.zeros(len(names) + 1, device=device)
    sums[-1] = routers
    for n, name in enumerate(names):
        if name not in tracker:
            continue
        values, group = _entry(tracker[name])
        total = values.sum()
        values.zero_()  # stays where it is, for passes that a CUDA graph replays
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        elif (ranks := parallel_state.get_tensor_model_parallel_group()).size() > 1:  # z-loss: of a rank's own tokens
            torch.distributed.all_reduce(total, group=ranks)
            total /= ranks.size()
        sums[n] = total
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(sums, group=group)
    return {name: float(sums[n] / (sums[-1] * num_micro_batches)) for n, name in enumerate(names)}


def _names(config: Any) -> list[str]:
    """The router's losses that this config asks for, as Megatron Core's tracker names them."""
    kinds = config.moe_router_load_balancing_type
    coefficients = config.moe_aux_loss_coeff
    pairs = zip(kinds, coefficients, strict=True) if isinstance(kinds, list) else [(kinds, coefficients)]
    spelt = {kind: f"{kind.removesuffix('aux_loss')}load_balancing_loss" for kind in _KINDS}
    names = [spelt[kind] for kind, coefficient in pairs if kind in spelt and coefficient]
    return names + (["z_loss"] if config.moe_z_loss_coeff is not None else [])


def tracked() -> dict[str, Any]:
    """Megatron Core's own record of the router's losses, by name."""
    found: dict[str, Any]
    found = moe_utils.get_moe_layer_wise_logging_tracker() if _router_losses is None else _router_losses().metrics
    return found


def _entry(kept: Any) -> tuple[torch.Tensor, Any]:
    """A loss's values by layer, and the group that sums them."""
    if isinstance(kept, dict):
        return kept["values"], kept.get("reduce_group")
    return kept.values, kept.reduce_group
