"""Global batches, run through Megatron Core's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from mbx.train.data.ahead import Ahead
from mbx.train.data.batch import Batch, forward_step, to_device
from mbx.train.data.rows import Row, Rows, micro_batches
from mbx.train.distill.stored import Taught
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe
from mbx.train.run.graph import WARM_STEPS, Graph, Results
from mbx.train.run.hooks import NO_HOOKS, Hooks, learned

if TYPE_CHECKING:
    from mbx.models.megatron.core.beside import Beside
    from mbx.models.megatron.core.training import DistributedDataParallel
    from mbx.train.data.pictures import Eyes
    from mbx.train.distill.teaching import Teaching
    from mbx.train.model.sight import Seeing
    from mbx.train.run.stragglers import Stragglers


class Batches:
    """What turns rows into losses and gradients of a model's `chunks`; `beside` takes the losses that are not the
    label's, `eyes` read images and `seeing` has the tower for them, `teaching` a teacher; `hooks` say what is learned.
    `stragglers` time how long micro-batches take.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        chunks: Sequence[DistributedDataParallel],
        beside: Beside,
        *,
        graphed: bool = False,
        eyes: Eyes | None = None,
        seeing: Seeing | None = None,
        teaching: Teaching | None = None,
        stragglers: Stragglers | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        from mbx.models.megatron.core.training import get_forward_backward_func

        self.recipe, self.ranks, self.chunks, self.beside = recipe, ranks, chunks, beside
        self.seeing, self.teaching, self.stragglers = seeing, teaching, stragglers
        self.sight = None if eyes is None else eyes.sight
        looks = eyes is not None and seeing is not None and seeing.tower is not None
        self.images = Ahead(eyes) if eyes is not None and looks else None
        self.learn = partial(learned, hooks) if hooks.token_losses else None
        self.forward_backward = get_forward_backward_func()
        one = partial(self._pass, count=1, forward_only=False)
        rounds = recipe.train.global_batch // (recipe.train.micro_batch * ranks.dp)
        self.graph = Graph(chunks[0], lambda batches: one([batches]), rounds) if graphed else None
        self.warm = 0

    def close(self) -> None:
        """Read no more, and let go of what was recorded: a communicator that a graph uses does not end before it."""
        if self.images is not None:
            self.images.close()
        if self.graph is not None:
            self.graph.close()

    def run(self, rows: Rows, step: int, size: int, *, forward_only: bool) -> torch.Tensor:
        """Run the `step`-th batch of `size` rows through Megatron Core's schedule.

        (Σ loss, Σ weight), on the device and not waited for. The loss is their quotient: per token, or in training
        without `per_token_loss` the mean over micro-batches of their means, as Megatron-LM reports it.
        """
        from mbx.models.megatron.core.groups import parallel_state as ps

        t = self.recipe.train
        if self.graph is not None and not forward_only and self.warm >= WARM_STEPS:
            results = self.graph.step(self._batches(rows, step, size, trained=True, recorded=True))
        else:
            count = size // (t.micro_batch * self.ranks.dp)
            batches = [self._batches(rows, step, size, trained=not forward_only) for _ in self.chunks]
            if self.stragglers is not None and not forward_only:
                batches = [self.stragglers.rows(one) for one in batches]
            results = self._pass(batches, count=count, forward_only=forward_only)
            self.warm += not forward_only
        exact = torch.float64 if self.ranks.device == "cpu" else torch.float32
        total = torch.zeros(2, dtype=exact, device=self.ranks.device)
        if ps.is_pipeline_last_stage():
            sums = torch.stack([r["loss"] for r in results]).to(total.dtype)
            per_batch = torch.stack((sums[:, 0] / sums[:, 1].clamp(min=1), torch.ones_like(sums[:, 0])), dim=1)
            total = (sums if t.per_token_loss or forward_only else per_batch).sum(0)
            if isinstance(rows, Taught) and rows.missing:  # no loss anywhere, so that all ranks come to look for why
                total.fill_(math.nan)
            torch.distributed.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        if self.recipe.parallel.pp > 1:
            last = ps.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(total, src=last, group=ps.get_pipeline_model_parallel_group())
        return total

    def _pass(self, batches: list[Iterator[Batch]], *, count: int, forward_only: bool) -> Results:
        """What `count` micro-batches say of their losses; gradients are in the chunks' buffers."""
        teaching = None if forward_only else self.teaching  # validation is the data's own loss
        length, micro = self.recipe.data.length, self.recipe.train.micro_batch
        if self.ranks.te and self.recipe.data.packs:
            length, micro = length * micro, 1  # packed rows travel between stages as one
        step = partial(
            forward_step,
            beside=self.beside,
            seeing=self.seeing,
            learn=None if forward_only else self.learn,
            teaching=teaching,
        )
        with nullcontext() if teaching is None else teaching.speaking():
            results: Results = self.forward_backward(
                forward_step_func=step,
                data_iterator=batches,
                model=self.chunks,
                num_microbatches=count,
                seq_length=length,
                micro_batch_size=micro,
                forward_only=forward_only,
            )
        return results

    def _batches(self, rows: Rows, step: int, size: int, *, trained: bool, recorded: bool = False) -> Iterator[Batch]:
        micros = self._micro_batches(rows, step, size)
        coming: list[Row] | None = next(micros)
        while coming is not None:
            micro, coming = coming, next(micros, None)
            images = None
            if self.images is not None:
                images = self.images.of(micro)
                # behind a step's last comes the first of the next
                if coming is not None or trained:
                    self.images.begin(coming or next(self._micro_batches(rows, step + 1, size)))
            batch = to_device(micro, self.ranks, self.recipe.parallel.cp, self.sight, images)
            yield batch if self.seeing is None else self.seeing.look(batch, recorded=recorded)

    def _micro_batches(self, rows: Rows, step: int, size: int) -> Iterator[list[Row]]:
        from mbx.models.megatron.core.groups import parallel_state as ps

        return micro_batches(
            rows,
            step,
            global_batch=size,
            micro_batch=self.recipe.train.micro_batch,
            dp=self.ranks.dp,
            dp_rank=ps.get_data_parallel_rank(),
        )
