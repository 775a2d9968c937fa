"""The training loop, from a recipe to a run folder, in the order in which it happens.

Megatron Core does the parallel work: its schedules run the micro-batches, its DistributedDataParallel reduces
gradients, its optimizer steps. This file decides what they are given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.errors import DifferenceError
from mbx.train.checkpoints.state import LoopState, read_state
from mbx.train.checkpoints.store import Store
from mbx.train.data.batch import Batch, forward_step, to_device
from mbx.train.data.rows import Rows, megatron_rows, micro_batches
from mbx.train.lora.attach import attach, base_of
from mbx.train.lora.peft_folder import load_peft
from mbx.train.model import build as models
from mbx.train.model.parallel import session
from mbx.train.model.warmup import warm_up
from mbx.train.model.weights import load_weights
from mbx.train.run import memory
from mbx.train.run.log import Log, Step
from mbx.train.run.prepare import Prepared
from mbx.train.run.schedule import learning_rate
from mbx.train.run.stepping import GuardedStep
from mbx.train.run.stop import Stop

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer

#: Dense peak in TFLOP/s of bf16 products by GPU name (NVIDIA's data sheets, without sparsity); FP8 doubles it.
_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: losses by step from `first_step` on, and why it stopped."""

    run_dir: Path
    first_step: int
    losses: tuple[float, ...]
    stopped: str


def train(prepared: Prepared, *, live: bool = True, on_step: Callable[[Step], None] = lambda _: None) -> Outcome:
    """Run a prepared recipe to its end, to SIGTERM or Ctrl-C, or to a loss that is not a number; collective."""
    recipe, ranks = prepared.recipe, prepared.ranks
    with session(recipe, ranks):
        log = Log(recipe, main=ranks.is_main, live=live)
        try:
            return _Trainer(prepared, log, on_step).run()
        except torch.cuda.OutOfMemoryError as error:
            raise memory.explain(prepared, error) from error
        finally:
            log.close()


class _Trainer:
    """One run inside its session: builds everything once, then steps."""

    def __init__(self, prepared: Prepared, log: Log, on_step: Callable[[Step], None]) -> None:
        from mbx.models.megatron.core.config import get_model_config
        from mbx.models.megatron.core.training import get_forward_backward_func

        self.prepared, self.recipe, self.ranks, self.plan = prepared, prepared.recipe, prepared.ranks, prepared.plan
        self.log, self.on_step = log, on_step
        log.message(prepared.start.why)
        how = prepared.start.how

        source = prepared.start.path
        resumed = read_state(source) if source and how == "resume" else None
        # absolute: an adapter run reads its base there again, from wherever it is resumed or merged
        self.base = resumed.base if resumed else str(source.absolute() if source else "")

        # 1. the model's chunks, with this rank's weights read straight from their storage
        warm_up(self.recipe, self.plan, self.ranks)
        networks = models.build(self.recipe, self.plan, self.ranks)
        for bare in map(models.unwrap, networks):
            if source and how == "init":
                log.message(load_weights(bare, self.plan, source))
            if self.recipe.lora.rank:
                attach(bare, self.recipe.lora, self.plan, self.recipe.train.seed)
                if resumed:  # the frozen base is in no checkpoint of an adapter run
                    log.message(load_weights(bare, self.plan, base_of(self.base)))
                elif self.recipe.lora.adapter:
                    load_peft(bare, self.plan, Path(self.recipe.lora.adapter))

        # 2. gradients, optimizer, schedules
        self.chunks: list[DistributedDataParallel] = [
            models.wrap(self.recipe, network, self.ranks, bucketed=number == 0)
            for number, network in enumerate(networks)
        ]
        self.optimizer: MegatronOptimizer = models.optimizer(self.recipe, self.chunks, self.ranks)
        waits = [chunk.no_sync for chunk in self.chunks]
        for config in map(get_model_config, self.chunks):
            config.grad_scale_func = self.optimizer.scale_loss
            config.finalize_model_grads_func = _finalizer()
            if self.chunks[0].ddp_config.overlap_grad_reduce:
                config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self.forward_backward = get_forward_backward_func()
        self.mark_first = models.first_microbatch(*self.chunks)
        self.take_step = GuardedStep(self.optimizer)

        # 3. rows, and the place in them
        self.train_rows, self.eval_rows = self._rows()
        if self.recipe.train.eval_every and self.eval_rows is None:
            self.log.message("there are no validation rows: train.eval_every evaluates nothing")
        self.store = Store(self.recipe, self.plan, self.ranks)
        self.step, self.saved, self.mean_loss = 0, -1, math.nan
        if source and resumed:
            self.store.load(source, self.chunks, self.optimizer)
            self.step, self.saved, self.mean_loss = resumed.step, resumed.step, resumed.mean_loss
        self.flops = models.flops_per_token(
            self.plan.config, self.recipe.data.length, self.plan.padded_vocab, self.recipe.lora.rank > 0
        )

    def _rows(self) -> tuple[Rows, Rows | None]:
        if self.prepared.train_rows is not None:
            return self.prepared.train_rows, self.prepared.eval_rows
        t = self.recipe.train
        rounds = t.steps // t.eval_every + 1 if t.eval_every else 0
        return megatron_rows(
            self.recipe.data, self.plan.vocab, t.steps * t.global_batch, rounds * t.eval_steps * t.global_batch
        )

    def run(self) -> Outcome:
        """Step to the end; save on the way, at the end, and when told to stop."""
        t, r = self.recipe.train, self.recipe.run
        first, losses, stopped = self.step, [], "finished"
        if self.ranks.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Stop(self.ranks.is_main) as stop:
            while self.step < t.steps:
                figures = self._one_step()
                losses.append(figures.loss)
                self.log.step(figures)
                self.on_step(figures)
                self._check_loss(figures)
                if t.eval_every and self.step % t.eval_every == 0 and self.eval_rows is not None:
                    self.log.evaluation(self.step, self._evaluate())
                if self._any(bool(stop.asked)):
                    stopped = f"stopped by {stop.asked or 'a signal to another rank'}"
                    break
                self.store.settle(wait=False)
                if r.save and r.save_every and self.step % r.save_every == 0 and self.step < t.steps:
                    self._save()
            if r.save and self.step != self.saved:
                self._save()
            self.store.settle(wait=True)
        self.log.message(
            f"{stopped} at step {self.step}" + (f"; checkpoint in {self.recipe.run_dir}" if r.save else "")
        )
        memory.compare(self.prepared, self.log)
        return Outcome(self.recipe.run_dir, first, tuple(losses), stopped)

    def _one_step(self) -> Step:
        """One optimizer step over a global batch."""
        t = self.recipe.train
        began = time.perf_counter()
        lr = learning_rate(self.recipe.optim, self.step, t.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.recipe.optim.weight_decay * group.get("wd_mult", 1.0)  # none on biases, norms
        self.mark_first()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, grad_norm, updated = self.take_step(
            self._forward_backward(self.train_rows, self.step, forward_only=False)
        )
        if not updated and math.isfinite(loss):  # fp16: the scaler met an infinity, lowered its scale and skipped
            self.log.message(f"step {self.step + 1}: skipped, gradients overflowed fp16")
        if self.ranks.device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        self.step += 1
        tokens = t.global_batch * self.recipe.data.length
        tflops = tokens * self.flops / took / self.ranks.world_size / 1e12
        peak = memory.peak_gib(self.ranks.device)
        return Step(self.step, loss, lr, grad_norm, tokens, took, tokens / took, tflops, tflops / self._peak(), peak)

    def _peak(self) -> float:
        """Peak TFLOP/s of this GPU at the run's precision; infinite, for an MFU of 0, where it is not known."""
        if self.ranks.device != "cuda" or self.recipe.train.precision == "fp32":
            return math.inf
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in _PEAK_TFLOPS.items() if key in name), math.inf)
        return peak * (2 if self.recipe.fp8.recipe != "none" else 1)

    def _forward_backward(self, rows: Rows, step: int, *, forward_only: bool) -> torch.Tensor:
        """Run one global batch through Megatron Core's schedule; its mean loss, on the device and not waited for."""
        from mbx.models.megatron.core.groups import parallel_state as ps

        t = self.recipe.train
        batches = [self._batches(rows, step) for _ in self.chunks]
        length, micro = self.recipe.data.length, t.micro_batch
        if self.ranks.te and self.recipe.data.packs:
            length, micro = length * micro, 1  # packed rows travel between stages as one
        results = self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=self.chunks,
            num_microbatches=t.global_batch // (t.micro_batch * self.ranks.dp),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=forward_only,
        )
        exact = torch.float64 if self.ranks.device == "cpu" else torch.float32
        total = torch.zeros(2, dtype=exact, device=self.ranks.device)
        if ps.is_pipeline_last_stage():
            sums = torch.stack([r["loss"] for r in results]).to(total.dtype)
            # per token: Σ loss / Σ tokens; else the mean over micro-batches of their means, as Megatron-LM reports it
            per_batch = torch.stack((sums[:, 0] / sums[:, 1].clamp(min=1), torch.ones_like(sums[:, 0])), dim=1)
            total = (sums if t.per_token_loss else per_batch).sum(0)
            torch.distributed.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        if self.recipe.parallel.pp > 1:
            last = ps.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(total, src=last, group=ps.get_pipeline_model_parallel_group())
        return total[0] / total[1].clamp(min=1)

    def _batches(self, rows: Rows, step: int) -> Iterator[Batch]:
        from mbx.models.megatron.core.groups import parallel_state as ps

        t = self.recipe.train
        for micro in micro_batches(
            rows,
            step,
            global_batch=t.global_batch,
            micro_batch=t.micro_batch,
            dp=self.ranks.dp,
            dp_rank=ps.get_data_parallel_rank(),
        ):
            yield to_device(micro, self.ranks, self.recipe.parallel.cp)

    def _evaluate(self) -> float:
        """Mean validation loss over `eval_steps` global batches."""
        assert self.eval_rows is not None
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            losses = [
                float(self._forward_backward(self.eval_rows, n, forward_only=True))
                for n in range(self.recipe.train.eval_steps)
            ]
        for chunk in self.chunks:
            chunk.train()
        return sum(losses) / len(losses)

    def _check_loss(self, figures: Step) -> None:
        """Stop on a loss that is not finite, or that leaves the running mean behind."""
        loss, factor = figures.loss, self.recipe.train.spike_factor
        if not math.isfinite(loss):
            fact, tip = f"the loss is {loss}; weights were not updated by it", "; a lower optim.lr may help"
        elif factor and loss > factor * self.mean_loss:
            mean = f"{factor:g} times its running mean {self.mean_loss:.4f}"
            fact, tip = f"the loss {loss:.4f} is more than train.spike_factor {mean}", ""
        else:
            self.mean_loss = loss if math.isnan(self.mean_loss) else 0.95 * self.mean_loss + 0.05 * loss
            return
        self.store.settle(wait=True)  # what is being written is what resume continues from
        again = f"‹resume› continues from step {self.saved}" if self.saved > 0 else "no checkpoint was saved before"
        raise DifferenceError(f"step {figures.step}: {fact}", hint=again + tip)

    def _save(self) -> None:
        state = LoopState(self.step, self.mean_loss, self.base, self.ranks.world_size)
        self.store.save(state, self.chunks, self.optimizer)
        self.saved = self.step

    def _any(self, flag: bool) -> bool:
        """Whether any rank was told to stop: they must all stop at the same step."""
        told = torch.tensor([1.0 if flag else 0.0], device=self.ranks.device)
        torch.distributed.all_reduce(told)
        return bool(told.item() > 0)


def _finalizer() -> Callable[..., None]:
    """Megatron Core's reduction of gradients over data, tensor (sequence) and pipeline (tied embedding) ranks."""
    from mbx.models.megatron.core.training import finalize_model_grads

    function: Callable[..., None] = finalize_model_grads
    return function
