"""Global batches, run through Megatron Core's schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from mbx.train.data.batch import Batch, forward_step, to_device
from mbx.train.data.rows import Rows, micro_batches
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from mbx.models.megatron.core.beside import Beside
    from mbx.models.megatron.core.training import DistributedDataParallel


class Batches:
    """What turns rows into losses and gradients of a model's `chunks`; `beside` takes the losses that are not the
    label's."""

    def __init__(
        self, recipe: Recipe, ranks: Ranks, chunks: Sequence[DistributedDataParallel], beside: Beside
    ) -> None:
        from mbx.models.megatron.core.training import get_forward_backward_func

        self.recipe, self.ranks, self.chunks, self.beside = recipe, ranks, chunks, beside
        self.forward_backward = get_forward_backward_func()

    def run(self, rows: Rows, step: int, size: int, *, forward_only: bool) -> torch.Tensor:
        """Run the `step`-th batch of `size` rows through Megatron Core's schedule.

        (Σ loss, Σ weight), on the device and not waited for. The loss is their quotient: per token, or in training
        without `per_token_loss` the mean over micro-batches of their means, as Megatron-LM reports it.
        """
        from mbx.models.megatron.core.groups import parallel_state as ps

        t = self.recipe.train
        batches = [self._batches(rows, step, size) for _ in self.chunks]
        length, micro = self.recipe.data.length, t.micro_batch
        if self.ranks.te and self.recipe.data.packs:
            length, micro = length * micro, 1  # packed rows travel between stages as one
        results = self.forward_backward(
            forward_step_func=partial(forward_step, beside=self.beside),
            data_iterator=batches,
            model=self.chunks,
            num_microbatches=size // (t.micro_batch * self.ranks.dp),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=forward_only,
        )
        exact = torch.float64 if self.ranks.device == "cpu" else torch.float32
        total = torch.zeros(2, dtype=exact, device=self.ranks.device)
        if ps.is_pipeline_last_stage():
            sums = torch.stack([r["loss"] for r in results]).to(total.dtype)
            per_batch = torch.stack((sums[:, 0] / sums[:, 1].clamp(min=1), torch.ones_like(sums[:, 0])), dim=1)
            total = (sums if t.per_token_loss or forward_only else per_batch).sum(0)
            torch.distributed.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        if self.recipe.parallel.pp > 1:
            last = ps.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(total, src=last, group=ps.get_pipeline_model_parallel_group())
        return total

    def _batches(self, rows: Rows, step: int, size: int) -> Iterator[Batch]:
        from mbx.models.megatron.core.groups import parallel_state as ps

        t = self.recipe.train
        for micro in micro_batches(
            rows,
            step,
            global_batch=size,
            micro_batch=t.micro_batch,
            dp=self.ranks.dp,
            dp_rank=ps.get_data_parallel_rank(),
        ):
            yield to_device(micro, self.ranks, self.recipe.parallel.cp)
