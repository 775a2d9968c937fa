"""An optimizer step that the GPU never waits for.

Megatron Core's step reads the gradients' norm to decide on clipping, and walks over the weights in between. While the
GPU still computes gradients that costs nothing; behind a value that was read, the GPU stands still for it: under
adapters of an 8B model, 11 ms of a step of 140. Here the norm and the factor of clipping stay on the GPU, and the
whole step is queued behind the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer

#: Megatron Core's method that leaves out what other ranks count as well, by release, the newest name first.
_COUNTED = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")


class Stepper:
    """A step of Megatron Core's optimizer, and what it says of itself, read once it is queued.

    The loss scale of fp16 has to know of overflows before anything is written: there Megatron Core's own step runs.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self.optimizer = optimizer
        self._parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        self._scaled = any(getattr(part, "grad_scaler", None) is not None for part in self._parts)
        for part in self._parts:
            _copy_at_once(part)

    def __call__(self, loss: torch.Tensor, behind: Callable[[], None] = lambda: None) -> tuple[float, float, bool]:
        """Step; the loss, the gradient's norm, and whether weights were written (fp16 may have overflowed).

        `behind` is done between queueing the step and waiting for it. A loss that is no number leaves weights that are
        none either: whoever reads it has to stop there.
        """
        if self._scaled:
            updated, norm, _ = self.optimizer.step()
            behind()
            return float(loss), float(norm or 0.0), bool(updated)
        for part in self._parts:
            part.prepare_grads()
        found = self._clipped(loss.device)
        self.optimizer.step_with_ready_grads()
        behind()
        seen, norm = torch.stack([loss.double(), found.double()]).tolist()
        return seen, norm, True

    @torch.no_grad()
    def _clipped(self, device: torch.device) -> torch.Tensor:
        """Scale gradients down to the norm that is allowed; the norm they had, as Megatron Core counts it.

        A pipeline stage that trains nothing counts with the others.
        """
        norm = sum((_square(part, device) for part in self._parts), torch.zeros((), device=device)).sqrt()
        for part in self._parts:
            grads = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
            if part.config.clip_grad > 0 and grads:
                torch._foreach_mul_(grads, (part.config.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _square(part: MegatronOptimizer, device: torch.device) -> torch.Tensor:
    """The squared norm of an optimizer's gradients over its ranks; parameters that several hold count once."""
    counted = next(getattr(part, name) for name in _COUNTED if hasattr(part, name))
    grads = counted()
    square = torch.nn.utils.get_total_norm(grads).float().square() if grads else torch.zeros((), device=device)
    torch.distributed.all_reduce(square, group=part.get_grad_stats_parallel_group())
    return square


def finalize(chunks: Sequence[DistributedDataParallel], tokens: torch.Tensor | None = None, **groups: object) -> None:
    """Megatron Core's reduction of gradients over data, tensor (sequence) and pipeline (tied embedding) ranks, and
    their division by the batch's `tokens`, which is there after the last stage alone and which nobody reads."""
    from mbx.models.megatron.core.groups import parallel_state as ps
    from mbx.models.megatron.core.training import finalize_model_grads

    finalize_model_grads(list(chunks), None, **groups)
    if tokens is None:
        return
    if ps.get_pipeline_model_parallel_world_size() > 1:
        last, group = ps.get_pipeline_model_parallel_last_rank(), ps.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tokens, src=last, group=group)
    torch.distributed.all_reduce(tokens, group=ps.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / tokens.clamp(min=1))


def _copy_at_once(optimizer: MegatronOptimizer) -> None:
    """Let an optimizer of fp32 copies write its weights in a few kernels instead of one a weight.

    Megatron Core copies one by one in bf16, because Apex had no kernel for it; an adapter of an 8B model is 352
    weights and its step 2 % of a short row's. Only for weights on a GPU, and only where the method is as in 0.16.
    """
    pairs = getattr(optimizer, "_get_model_and_main_params_data_float16", None)
    if (
        type(optimizer).__name__ != "Float16OptimizerWithFloat16Params"
        or pairs is None
        or not torch.cuda.is_available()
    ):
        return

    def copy() -> None:
        weights, copies = pairs()
        if weights:
            torch._foreach_copy_(weights, copies)

    optimizer._copy_main_params_to_model_params = copy
