"""The training loop, from a recipe to a run folder, in the order in which it happens.

Megatron Core does the parallel work: its schedules run the micro-batches, its DistributedDataParallel reduces
gradients, its optimizer steps. This file decides what they are given.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.errors import DifferenceError
from mbx.live.exchange import agreed
from mbx.train.budget.devices import peak_tflops
from mbx.train.checkpoints.state import LoopState, read_state, same_processes
from mbx.train.checkpoints.store import Store
from mbx.train.data.evaluation import OnePass, one_pass
from mbx.train.data.rows import Rows, megatron_rows
from mbx.train.distill.stored import Taught
from mbx.train.model import build as models
from mbx.train.model.graphs import why_not
from mbx.train.model.kernels import compiling
from mbx.train.model.parallel import on_any_rank, session
from mbx.train.run import memory
from mbx.train.run.batches import Batches
from mbx.train.run.begin import begin, flops_of, taught
from mbx.train.run.failing import explained
from mbx.train.run.graph import one_stream
from mbx.train.run.keeping import Keeper
from mbx.train.run.log import Log, Step
from mbx.train.run.prepare import Prepared
from mbx.train.run.profile import Profile
from mbx.train.run.rewind import Rewind
from mbx.train.run.schedule import learning_rate
from mbx.train.run.stepping import Stepper, finalize
from mbx.train.run.stop import Stop
from mbx.train.run.stragglers import Stragglers
from mbx.train.run.validation import validation_loss

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: losses by step from `first_step` on, and why it stopped."""

    run_dir: Path
    first_step: int
    losses: tuple[float, ...]
    stopped: str


def train(
    prepared: Prepared,
    *,
    live: bool = True,
    messages: bool = True,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Outcome:
    """Run a prepared recipe to its end, to SIGTERM or Ctrl-C, or to a loss that is not a number; collective.

    `live`: a view where there is a terminal; `messages`: lines on stderr at all.
    """
    recipe, ranks = prepared.recipe, prepared.ranks
    graphed = why_not(recipe, prepared.plan.config, ranks) is None
    if ranks.device == "cuda":  # a wrapper and its hooks are a cycle: an earlier run's model may still be on the GPU
        gc.collect()
    with session(recipe, ranks), one_stream() if graphed else contextlib.nullcontext():
        log = Log(recipe, main=ranks.is_main, live=live and messages, messages=messages)
        with contextlib.ExitStack() as stack:
            stack.callback(log.close)
            try:
                trainer = Trainer(prepared, log, on_step)
                stack.callback(trainer.close)
                return trainer.run()
            except RuntimeError as error:
                if (known := explained(prepared, error)) is None:
                    raise
                raise known from error


class Trainer:
    """One run inside its session: builds everything once, then steps.

    `on_gradients` is called with the chunks when a step's gradients are whole, before they are clipped and used.
    """

    def __init__(
        self,
        prepared: Prepared,
        log: Log,
        on_step: Callable[[Step], None] = lambda _: None,
        on_gradients: Callable[[Sequence[DistributedDataParallel]], None] = lambda _: None,
    ) -> None:
        from mbx.models.megatron.core.config import get_model_config

        self.prepared, self.recipe, self.ranks, self.plan = prepared, prepared.recipe, prepared.ranks, prepared.plan
        self.log, self.on_step, self.on_gradients = log, on_step, on_gradients
        log.message(prepared.start.why)

        # 1. the model's chunks, with this rank's weights
        begun = begin(prepared, log)
        self.beside, self.seeing, self.base = begun.beside, begun.seeing, begun.base

        # 2. gradients, optimizer, schedules
        graphed = why_not(self.recipe, self.plan.config, self.ranks) is None
        self.chunks: list[DistributedDataParallel] = [
            models.wrap(self.recipe, network, self.ranks, bucketed=number == 0, at_once=graphed)
            for number, network in enumerate(begun.networks)
        ]
        self.teaching = taught(prepared, self.chunks, log)
        self.optimizer: MegatronOptimizer = models.optimizer(self.recipe, self.chunks, self.ranks)
        waits = [chunk.no_sync for chunk in self.chunks]
        for config in map(get_model_config, self.chunks):
            config.grad_scale_func = self.optimizer.scale_loss
            config.finalize_model_grads_func = finalize
            if self.chunks[0].ddp_config.overlap_grad_reduce:
                config.no_sync_func = waits if len(waits) > 1 else waits[0]
        watched = self.recipe.run.stragglers
        cuda = self.ranks.device == "cuda"
        self.stragglers = Stragglers(self.recipe, self.chunks, log, cuda=cuda) if watched else None
        self.batches = Batches(
            self.recipe,
            self.ranks,
            self.chunks,
            self.beside,
            graphed=graphed,
            eyes=prepared.data.eyes,
            seeing=self.seeing,
            teaching=self.teaching,
            stragglers=self.stragglers,
            hooks=prepared.hooks,
        )
        self.mark_first = models.first_microbatch(*self.chunks)
        self.take_step = Stepper(self.optimizer)
        self._clear_gradients()

        # 3. rows, and the place in them
        self.train_rows, self.eval_rows = self._rows()
        if self.recipe.train.eval_every and self.eval_rows is None:
            self.log.message("there are no validation rows: train.eval_every evaluates nothing")
        self.store = Store(self.recipe, self.plan, self.ranks, prepared.hooks.on_save, log.message)
        self.step, self.mean_loss = 0, math.nan
        self.rewind = Rewind(self.recipe, begun.resumed)
        traced = self.recipe.run.profile if self.ranks.is_main else 0
        self.profile = Profile(traced, self.recipe.run_dir, log, cuda=self.ranks.device == "cuda")
        resumed = begun.resumed
        self.keeper = Keeper(self.recipe, self.ranks, self.store, log, resumed.step if resumed else None)
        source = prepared.start.path
        if source and resumed:
            same = same_processes(self.recipe, source, self.ranks.world_size)
            self.store.load(source, self.chunks, self.optimizer, same=same)
            if not same:
                log.message(
                    f"the layout changed: random streams, which dropout draws from, start anew at {source.name}"
                )
            self.step, self.mean_loss = resumed.step, resumed.mean_loss
        self.flops = flops_of(prepared)

    def close(self) -> None:
        """Let go of what would outlive the run: recorded passes, and what modules keep of the last one."""
        from mbx.models.megatron.core.last_pass import forget_last_pass

        self.profile.close()
        self.batches.close()
        forget_last_pass(self.chunks)

    def _rows(self) -> tuple[Rows, OnePass | None]:
        t = self.recipe.train
        train_rows, eval_rows = self.prepared.train_rows, self.prepared.eval_rows
        if train_rows is None:
            rounds = t.steps // t.eval_every + 1 if t.eval_every else 0
            train_rows, eval_rows = megatron_rows(
                self.recipe.data, self.plan.vocab, t.steps * t.global_batch, rounds * t.eval_steps * t.global_batch
            )
        if (logits := self.prepared.logits) is not None:
            train_rows = logits.beside(train_rows)
        return train_rows, None if eval_rows is None else one_pass(eval_rows, t.eval_steps * t.global_batch)

    def run(self) -> Outcome:
        """Step to the end; save on the way, at the end, and when told to stop."""
        t, r = self.recipe.train, self.recipe.run
        first, losses, stopped = self.step, [], "finished"
        if self.ranks.te and (text := compiling(self.plan.config)):
            self.log.message(text)
        if self.ranks.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Stop(self.ranks.is_main) as stop:
            while self.step < t.steps:
                figures = self.one_step()
                losses.append(figures.loss)
                self.log.step(figures)
                self.on_step(figures)
                if self.ranks.is_main and self.prepared.hooks.on_step:
                    self.prepared.hooks.on_step(figures)
                self.profile.step(self.step)
                if self.stragglers is not None:
                    self.stragglers.step(self.step)
                if self._went_back(figures):
                    del losses[self.step - first :]
                    continue
                self._check_loss(figures)
                if t.eval_every and self.step % t.eval_every == 0 and self.eval_rows is not None:
                    found = validation_loss(self.recipe, self.ranks, self.chunks, self.batches, self.eval_rows)
                    why = self.keeper.judge(self.step, found, self._save)
                    if why:
                        stopped = why
                        break
                if on_any_rank(bool(stop.asked), self.ranks.device):  # they must all stop at the same step
                    stopped = f"stopped by {stop.asked or 'a signal to another rank'}"
                    break
                self.keeper.settle(wait=False)
                if r.save and self.step < t.steps and self.keeper.due(self.step):
                    self._save()
            if r.save:
                self._save(last=True)
                self.keeper.export(self.step, self.chunks, self.base, last=True)
            self.keeper.finish()
        lost = f"; not written on the way: {', '.join(self.keeper.lost)}" if self.keeper.lost else ""
        saved = f"; checkpoint in {self.recipe.run_dir}" if r.save else ""
        self.log.message(f"{stopped} at step {self.step}{saved}{lost}")
        memory.compare(self.prepared, self.log)
        return Outcome(self.recipe.run_dir, first, tuple(losses), stopped)

    def one_step(self) -> Step:
        """One optimizer step over a global batch."""
        t = self.recipe.train
        began = time.perf_counter()
        lr = learning_rate(self.recipe.optim, self.step, t.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.recipe.optim.weight_decay * group.get("wd_mult", 1.0)  # none on biases, norms
        self.mark_first()
        total = self.batches.run(self.train_rows, self._batch(), t.global_batch, forward_only=False)
        self.on_gradients(self.chunks)
        loss, grad_norm, updated = self.take_step(total[0] / total[1].clamp(min=1), self._clear_gradients)
        if not updated and math.isfinite(loss):  # fp16: the scaler met an infinity, lowered its scale and skipped
            self.log.message(f"step {self.step + 1}: skipped, gradients overflowed fp16")
        beside = self.beside.read(t.global_batch // (t.micro_batch * self.ranks.dp))
        beside |= self.teaching.read() if self.teaching else {}
        if self.ranks.device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        self.step += 1
        tokens = t.global_batch * self.recipe.data.length
        tflops = tokens * self.flops / took / self.ranks.world_size / 1e12
        peak = memory.peak_gib(self.ranks.device)
        mfu = tflops / (peak_tflops(self.recipe) if self.ranks.device == "cuda" else math.inf)
        return Step(self.step, loss, lr, grad_norm, tokens, took, tokens / took, tflops, mfu, peak, beside)

    def _batch(self) -> int:
        """The number of the batch of this step; of Megatron Core's rows there are as many as steps."""
        number = self.step + self.rewind.skipped
        return number if self.prepared.train_rows is not None else number % self.recipe.train.steps

    def _clear_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _went_back(self, figures: Step) -> bool:
        """Go back to the last checkpoint where the loss has left what it was and the recipe says so."""
        if math.isnan(figures.loss) and isinstance(self.train_rows, Taught):
            with agreed():
                self.train_rows.check()
        if not (why := self.rewind.why(figures.loss)):
            return False
        self.keeper.settle(wait=True)
        back = self.rewind.place(self.step, why, self.store.last)
        self.store.load(
            back, self.chunks, self.optimizer, same=same_processes(self.recipe, back, self.ranks.world_size)
        )
        state = read_state(back)
        self.rewind.back(state, self.step, why, self.log)
        self.step, self.mean_loss = state.step, state.mean_loss
        self.keeper.back(self.step)
        self._clear_gradients()
        return True

    def _check_loss(self, figures: Step) -> None:
        """Stop on a loss that is not finite, or that leaves the running mean behind."""
        loss, factor = figures.loss, self.recipe.train.spike_factor
        if self.rewind.bad and self.step < self.recipe.train.steps:  # until it was so for as many as the recipe says
            return
        if not math.isfinite(loss):
            fact, tip = f"the loss is {loss}; nothing of this step is saved", "; a lower optim.lr may help"
        elif factor and loss > factor * self.mean_loss:
            mean = f"{factor:g} times its running mean {self.mean_loss:.4f}"
            fact, tip = f"the loss {loss:.4f} is more than train.spike_factor {mean}", ""
        else:
            self.mean_loss = loss if math.isnan(self.mean_loss) else 0.95 * self.mean_loss + 0.05 * loss
            return
        self.keeper.settle(wait=True)  # what is being written is what resume continues from
        saved = self.store.step
        again = f"‹resume› continues from step {saved}" if saved > 0 else "no checkpoint was saved before"
        raise DifferenceError(f"step {figures.step}: {fact}", hint=again + tip)

    def _save(self, *, last: bool = False) -> None:
        if self.rewind.bad and self.step < self.recipe.train.steps:
            self.log.message(f"step {self.step} is not saved: its loss is not what it was")
            return
        state = LoopState(
            self.step,
            self.mean_loss,
            self.base,
            self.ranks.world_size,
            self.prepared.data.identity,
            self.plan.padded_vocab,
        )
        self.keeper.save(self.rewind.into(state), self.chunks, self.optimizer, last=last)
