"""Hidden states that a student learns of its teacher beside logits: where layers hand them on, on any stage.

A stage in the middle of a pipeline has no loss. So a layer's distance adds its gradient to the one that comes back
through the layer's output, as Megatron Core does with the balance losses of experts. It is computed on the way
forward, and is all that is kept until then: one tensor of the teacher's width, pair and micro-batch.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mbx.train.data.batch import Batch
from mbx.train.distill.distance import distances
from mbx.train.model.build import unwrap
from mbx.train.model.hidden import Pair
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel

#: What projections are called in a student, and in its checkpoints, where no export looks for weights.
PART = "distill"


def project(model: nn.Module, pairs: Sequence[Pair], seed: int) -> None:
    """Give a bare student the projections of its layers, [teacher's width, its own], drawn by `seed` and layer.

    Every rank of tensor parallelism holds them whole. Under sequence parallelism each sees the gradients of its own
    tokens, which are summed as those of norms are.
    """
    from mbx.models.megatron.core.groups import set_defaults_if_not_set_tensor_model_parallel_attributes

    some = next(model.parameters())
    projections = nn.ModuleDict()
    for pair in _held(model, pairs):
        if not pair.projected:
            continue
        own, its = pair.widths
        drawn = torch.Generator().manual_seed(seed + zlib.crc32(f"{PART}.{pair.student}".encode()))
        weight = torch.randn(its, own, generator=drawn, device="cpu") / own**0.5
        linear = nn.Linear(own, its, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(some.device, some.dtype))
        set_defaults_if_not_set_tensor_model_parallel_attributes(linear.weight)
        if getattr(model.config, "sequence_parallel", False):
            linear.weight.sequence_parallel = True  # type: ignore[attr-defined]
        projections[str(pair.student)] = linear
    if len(projections):
        model.add_module(PART, projections)


def only_projections(weights: Mapping[str, object]) -> dict[str, object]:
    """The entries of a sharded state dict that are projections."""
    return {name: value for name, value in weights.items() if name.startswith(f"{PART}.")}


class Hidden:
    """The pairs of a whole model: hooks on the layers of a student's `chunks` and of its teacher's, one for one."""

    def __init__(
        self,
        recipe: Recipe,
        pairs: Sequence[Pair],
        chunks: Sequence[DistributedDataParallel],
        teachers: Sequence[nn.Module],
    ) -> None:
        from mbx.models.megatron.core.groups import parallel_state as ps

        self.recipe, self.pairs, self.chunks = recipe, pairs, chunks
        self._batch: Batch | None = None
        self._said: dict[int, torch.Tensor] = {}  # what the teacher's layers hand on in this micro-batch
        self._last = {pair.teacher: pair.student for pair in pairs}.values()  # who hears a layer of the teacher last
        self._again: dict[int, deque[torch.Tensor]] = {pair.student: deque() for pair in pairs}
        self._sums = torch.zeros(2, len(pairs), device=next(chunks[0].parameters()).device)
        self._cut = ps.get_tensor_model_parallel_world_size() if _shares(unwrap(chunks[0])) else 1
        self._rounds = recipe.train.global_batch // (recipe.train.micro_batch * ps.get_data_parallel_world_size())
        for chunk, teacher in zip(chunks, teachers, strict=True):
            student = unwrap(chunk)
            layers, others = _layers(student), _layers(teacher)
            for pair in _held(student, pairs):
                if pair.projected:
                    _keep_output(layers[pair.student])
                layers[pair.student].register_forward_hook(self._hears(chunk, pair))
            for number in {pair.teacher for pair in _held(student, pairs)}:
                others[number].register_forward_hook(self._says(number))

    @contextmanager
    def passing(self, batch: Batch) -> Iterator[None]:
        """The teacher's pass of a micro-batch through a stage, and the student's behind it."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None
            self._said.clear()

    def read(self) -> dict[str, float]:
        """The mean distance of the step's tokens, over the pairs, and forget it; collective, the same everywhere."""
        from mbx.models.megatron.core.groups import parallel_state as ps

        groups = [ps.get_data_parallel_group(with_context_parallel=True), ps.get_pipeline_model_parallel_group()]
        if self._cut > 1:
            groups.append(ps.get_tensor_model_parallel_group())
        total = self._sums.clone()
        self._sums.zero_()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return {"distill_hidden": float((total[0] / total[1].clamp(min=1)).mean())}

    def _says(self, number: int) -> Callable[..., None]:
        def keep(_: nn.Module, given: Any, output: Any) -> None:
            if self._batch is not None:
                self._said[number] = _states(output)

        return keep

    def _hears(self, chunk: DistributedDataParallel, pair: Pair) -> Callable[..., Any]:
        """A hook on the student's layer, which hands on the same states with the pair's gradient behind them.

        A layer that is to be computed again is passed without gradients first; micro-batches come back in the order
        in which they went.
        """
        waiting = self._again[pair.student]
        projections = getattr(unwrap(chunk), PART, None)
        projection: nn.Module | None = projections[str(pair.student)] if pair.projected else None  # type: ignore[index]

        def hear(_: nn.Module, given: Any, output: Any) -> Any:
            states, recorded = _states(output), torch.is_grad_enabled()
            if self._batch is None and not (waiting and recorded):
                return None  # validation
            mine = states if projection is None else projection(states)
            gradient = waiting.popleft() if self._batch is None else self._compared(chunk, pair, mine)
            if not recorded:
                waiting.append(gradient)
                return None
            heard = _Carry.apply(states, _Slope.apply(mine, gradient))  # type: ignore[no-untyped-call]
            return (heard, *output[1:]) if isinstance(output, tuple) else heard

        return hear

    def _compared(self, chunk: DistributedDataParallel, pair: Pair, mine: torch.Tensor) -> torch.Tensor:
        """The gradient of the pair's part in the loss by the student's states, both [s here, b, teacher's width]."""
        d, batch = self.recipe.distill, self._batch
        assert batch is not None and (mask := batch["mask"]) is not None
        its = self._said.pop(pair.teacher) if pair.student in self._last else self._said[pair.teacher]
        assert its.shape == mine.shape, f"states of {tuple(its.shape)} and {tuple(mine.shape)}"
        counted = mask.t().float().reshape(-1)
        if self._cut > 1:
            counted = mask.t().float().chunk(self._cut)[_place()].reshape(-1)
        factor = _scale(chunk) * (d.hidden_weight / len(self.pairs))
        if not self.recipe.train.per_token_loss:  # as the schedule divides the data's own loss
            factor = factor / mask.sum().to(torch.int).clamp(min=1) / self._rounds
        width = mine.shape[-1]
        flat, other = mine.detach().reshape(-1, width), its.reshape(-1, width)
        found, gradient = distances(flat, other, counted * factor, d.hidden_loss)
        column = self.pairs.index(pair)
        self._sums[:, column] += torch.stack(((found * counted).sum(), counted.sum()))
        return gradient.view(mine.shape)


class _Slope(torch.autograd.Function):
    """Something that has `gradient` by `states`, whatever comes back for it."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return states.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class _Carry(torch.autograd.Function):
    """`states` as they are, behind which `beside` gets a gradient as well."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        ctx.beside = beside
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.zeros_like(ctx.beside)


def _states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers of a bare chunk by their number in the whole model, from 1."""
    return {int(layer.layer_number): layer for layer in model.decoder.layers}  # type: ignore[union-attr]


def _keep_output(layer: nn.Module) -> None:
    """Let a layer that is computed again compute its output too: a projection reads it for its weight's gradient."""
    for module in layer.modules():
        if getattr(module, "ends_checkpoint", False):
            module.ends_checkpoint = False  # type: ignore[assignment]


def _held(model: nn.Module, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of a bare chunk."""
    here = _layers(model)
    return [pair for pair in pairs if pair.student in here]


def _shares(model: nn.Module) -> bool:
    return bool(getattr(model.config, "sequence_parallel", False))


def _place() -> int:
    from mbx.models.megatron.core.groups import parallel_state as ps

    return int(ps.get_tensor_model_parallel_rank())


def _scale(chunk: DistributedDataParallel) -> torch.Tensor:
    """What the data's own loss is multiplied by before it goes back: the loss scale of fp16."""
    from mbx.models.megatron.core.config import get_model_config

    one = torch.ones((), device=next(chunk.parameters()).device)
    scaled = get_model_config(chunk).grad_scale_func
    return one if scaled is None else scaled(one)
