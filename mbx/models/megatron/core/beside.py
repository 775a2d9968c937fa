"""What Megatron Core computes beside the main loss, under the masks of the rows: prediction layers, balance losses,
z-loss, and the counts behind the expert bias.

Its models take a loss mask and a padding mask. What 0.16.1 leaves undone with them is done here, on a built model:
- `roll_tensor` stops at the end of a row, and at the ends of examples only where `cu_seqlens` says them: a prediction
  layer would learn, behind an example, what another begins with. A micro-batch that leaves a layer nothing to predict
  divides 0 by 0.
- Prediction layers are given no padding mask, and their router balances padding.
- Behind the first pipeline stage no one cuts the padding mask for sequence parallelism.
- The count behind the expert bias multiplies [tokens, experts] by [tokens].
- Its own attention puts a sliding window in the place of a mask, not beside it: packed examples would see each other.
This file imports torch and megatron when it is imported.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.fusions import fused_softmax
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from mbx.models.megatron.core.balance import balance, tracked, weigh_by_row

#: The decoder layer inside a prediction layer, by release, the newest name first.
_INNER = ("mtp_model_layer", "transformer_layer")
#: The module that rolls labels and masks, by release: both hold the function by name.
_ROLLERS = tuple(module for module in (gpt_model, multi_token_prediction) if hasattr(module, "roll_tensor"))
_HELPER = multi_token_prediction.MTPLossLoggingHelper
#: What keeps a prediction layer's loss, by release, the newest name first; its arguments are told by name.
_KEEPER = next(name for name in ("save_metrics_to_tracker", "save_loss_to_tracker") if hasattr(_HELPER, name))
_KEPT = inspect.signature(getattr(_HELPER, _KEEPER))
_roll: Callable[..., tuple[torch.Tensor, torch.Tensor]] = multi_token_prediction.roll_tensor


@dataclass(slots=True)
class _Micro:
    """A micro-batch on its way forward. padding: [b, s], True is padding. owner: [b, s], the example of each token,
    where a row holds several."""

    padding: torch.Tensor | None = None
    owner: torch.Tensor | None = None


@dataclass(slots=True)
class Beside:
    """The masks of the micro-batch that is passed forward, and the sums of what was computed beside its loss.

    `watch` a bare model once; `masks` says what it may be given, and `passing` surrounds its forward pass.
    """

    _micro: _Micro = field(default_factory=_Micro)
    _depths: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _rolled: torch.Tensor | None = None
    _watched: list[nn.Module] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Give the parts of a bare GPTModel or MambaModel what Megatron Core does not give them."""
        self._watched.append(model)
        tracked().clear()  # of an earlier model of this process
        for module in list(model.modules()):
            if isinstance(module, TopKRouter):
                module._apply_expert_bias = partial(_count_tokens, module)
                weigh_by_row(module)
            elif isinstance(module, FusedScaleMaskSoftmax) and module.window_size is not None:
                module.forward_torch_softmax = partial(_window_and_mask, module, module.forward_torch_softmax)
            elif isinstance(module, multi_token_prediction.MultiTokenPredictionLayer):
                self._watch_prediction(module)
        if isinstance(decoder := getattr(model, "decoder", None), nn.Module):
            decoder.register_forward_pre_hook(_cut_padding, with_kwargs=True)

    def masks(self, model: nn.Module, mask: torch.Tensor, padding: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The arguments of a bare `model`'s forward pass that carry masks: mask [b, s], padding [b, s]."""
        taken = _accepted(model)
        given = {"loss_mask": mask, "padding_mask": padding}
        return {name: value for name, value in given.items() if name in taken and value is not None}

    @contextlib.contextmanager
    def passing(self, padding: torch.Tensor | None, owner: torch.Tensor | None) -> Iterator[None]:
        """A forward pass of one micro-batch."""
        self._micro = _Micro(padding, owner)
        try:
            with contextlib.ExitStack() as stack:
                for module in _ROLLERS:
                    stack.enter_context(patch.object(module, "roll_tensor", self._roll_within))
                stack.enter_context(patch.object(_HELPER, _KEEPER, staticmethod(self._keep)))
                yield
        finally:
            self._micro, self._rolled = _Micro(), None

    def read(self, num_micro_batches: int) -> dict[str, float]:
        """The step's losses beside the main one, by name, and forget them; collective, the same on every rank.

        `mtp_N_loss`: the mean over the tokens that layer N predicts. The router's by Megatron Core's names: without
        their coefficient, the mean over layers and micro-batches.
        """
        if not self._watched:
            return {}
        config: Any = self._watched[0].config
        found = {f"mtp_{depth + 1}_loss": value for depth, value in enumerate(self._predicted(config))}
        return found | balance(config, self._watched, num_micro_batches)

    def _predicted(self, config: Any) -> list[float]:
        depths = int(getattr(config, "mtp_num_layers", None) or 0)
        if not depths:
            return []
        device = next(self._watched[0].parameters()).device
        zero = torch.zeros(2, device=device)
        sums = torch.stack([torch.stack([zero, *self._depths.get(n, [])]).sum(0) for n in range(depths)])
        self._depths.clear()
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        return [float(loss / count.clamp(min=1)) for loss, count in sums]

    def _roll_within(self, tensor: torch.Tensor, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron Core's function, with nothing carried over the end of an example; the sum is at least 1."""
        rolled, _ = _roll(tensor, *args, **named)
        if named.get("packed_seq_params") is None:
            rolled = _within(rolled, self._micro.owner)
        if tensor.is_floating_point():
            self._rolled = rolled
        return rolled, rolled.sum().clamp(min=1)

    def _keep(self, *args: Any, **named: Any) -> None:
        """In the place of Megatron Core's tracker, which adds means: the sum, and the tokens it is of."""
        given = _KEPT.bind(*args, **named).arguments
        loss, layer_number = given["loss"], given["layer_number"]
        if layer_number is None:
            return
        assert self._rolled is not None
        count = self._rolled.sum().to(torch.float32)
        sums = torch.stack((loss.detach().to(torch.float32) * count.clamp(min=1), count))
        self._depths.setdefault(layer_number, []).append(sums)

    def _watch_prediction(self, layer: Any) -> None:
        """Hand a prediction layer's decoder layer the padding mask of its depth, recomputed or not."""
        plain: Callable[..., torch.Tensor] = layer._proj_and_transformer_layer
        inner: nn.Module = next(getattr(layer, name) for name in _INNER if hasattr(layer, name))
        now: list[torch.Tensor | None] = [None]

        def hook(_: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, (named if now[0] is None else {**named, "padding_mask": now[0]})

        def with_mask(mask: torch.Tensor | None, *args: Any, **named: Any) -> torch.Tensor:
            now[0] = mask
            try:
                return plain(*args, **named)
            finally:
                now[0] = None

        def before(_: nn.Module, args: Any) -> None:
            # bound now: a checkpoint runs it again when another micro-batch is on its way
            mask = self._padding_of(layer)
            layer._proj_and_transformer_layer = partial(with_mask, mask)

        inner.register_forward_pre_hook(hook, with_kwargs=True)
        layer.register_forward_pre_hook(before)

    def _padding_of(self, layer: Any) -> torch.Tensor | None:
        """Positions at which a prediction layer has no token ahead: padding is, and the end of each example."""
        if self._micro.padding is None and self._micro.owner is None:
            return None
        some = self._micro.padding if self._micro.padding is not None else self._micro.owner
        assert some is not None
        valid = torch.ones_like(some, dtype=torch.float32)
        if self._micro.padding is not None:
            valid = valid * ~self._micro.padding
        for _ in range(layer.layer_number):
            valid = _within(_roll(valid, cp_group=layer.cp_group)[0], self._micro.owner)
        return _local(valid == 0, layer.config)


def _accepted(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _within(rolled: torch.Tensor, owner: torch.Tensor | None) -> torch.Tensor:
    """[b, s] rolled by one, 0 where the next token is another example's."""
    if owner is None:
        return rolled
    same = torch.zeros_like(owner, dtype=torch.bool)
    same[:, :-1] = owner[:, :-1] == owner[:, 1:]
    return torch.where(same, rolled, torch.zeros_like(rolled))


def _local(padding: torch.Tensor, config: Any) -> torch.Tensor:
    """This rank's part of a padding mask [b, s] under sequence parallelism."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if not config.sequence_parallel or size == 1:
        return padding
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return padding.chunk(size, dim=1)[rank].contiguous()


def _cut_padding(decoder: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Cut the padding mask of a decoder that no embedding stands before."""
    padding, states = named.get("padding_mask"), named.get("hidden_states")
    if not getattr(decoder, "pre_process", True):
        states = decoder.input_tensor
    if padding is None or not isinstance(states, torch.Tensor) or padding.shape[1] == states.shape[0]:
        return args, named
    return args, {**named, "padding_mask": _local(padding, decoder.config)}


def _window_and_mask(
    softmax: Any,
    plain: Callable[..., torch.Tensor],
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    softmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention's softmax over scores [b, heads, s, s] under a window and a mask [b, 1, s, s], True is hidden.

    Tokens of which the mask shows one what comes later are of one image, where the window hides nothing.
    """
    if mask is None:
        return plain(scores, mask, softmax_offset)
    window = fused_softmax.get_sliding_window_causal_mask(*scores.shape[2:], softmax.window_size)
    ahead = (~mask).triu(1)
    with patch.object(softmax, "window_size", None):
        return plain(scores, mask | (window & ~(ahead | ahead.transpose(-1, -2))), softmax_offset)


def _count_tokens(router: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
    """Count the tokens of each expert: routing_map [tokens, experts], padding_mask [tokens]."""
    if not router.enable_expert_bias or not torch.is_grad_enabled():
        return
    with torch.no_grad():
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        router.local_tokens_per_expert += routing_map.sum(dim=0)
