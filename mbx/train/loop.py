"""The training loop, from a recipe to a run folder, in the order in which it happens.

Megatron Core does the parallel work: its schedules run the micro-batches, its DistributedDataParallel reduces
gradients, its optimizer steps. This file decides what they are given.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import DeviceError, DifferenceError, StorageError, UnsupportedError, UsageError
from mbx.train import data as datasets
from mbx.train import model as models
from mbx.train.fp8 import check_fp8
from mbx.train.log import Log, Step
from mbx.train.parallel import Ranks, planned_ranks, session
from mbx.train.recipe import Recipe
from mbx.train.schedule import learning_rate

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from torch import nn

    from mbx.train.data import Row, Rows

Batch = Mapping[str, "torch.Tensor | None"]
#: Dense peak in TFLOP/s of bf16 products by GPU name (NVIDIA's data sheets, without sparsity); FP8 doubles it.
_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: `how` is `init` (weights from `path`), `random`, or `resume` (everything from `path`)."""

    how: str
    path: Path | None
    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: losses by step from `first_step` on, and why it stopped."""

    run_dir: Path
    first_step: int
    losses: tuple[float, ...]
    stopped: str


def decide(recipe: Recipe, init_from: str | None, resume: bool) -> Start:
    """Where this run starts, and why; UsageError or StorageError where that is not possible or not clear."""
    from mbx.train.checkpoint import latest

    run = recipe.run_dir
    if init_from and resume:
        raise UsageError("--init-from starts a new run and --resume continues one: give one of them")
    if resume:
        found = latest(run)
        if found is None:
            raise StorageError(f"--resume: `{run}` holds no checkpoint", hint="leave --resume out to start the run")
        return Start("resume", found, f"resuming {run} at {found.name}")
    if run.is_dir() and any(run.iterdir()):
        raise UsageError(
            f"the run folder `{run}` is not empty", hint="--resume continues it; run.dir=NAME starts another"
        )
    if init_from:
        if not Path(init_from).is_dir():
            raise StorageError(f"--init-from: `{init_from}` does not exist")
        return Start("init", Path(init_from), f"new run in {run}, weights from {init_from}")
    if recipe.model.init == "random":
        return Start("random", None, f"new run in {run}, random weights (seed {recipe.train.seed})")
    if not recipe.model.path:
        raise UsageError(
            f"recipe `{recipe.name}` trains pretrained weights, and no model is named",
            hint="model=DIR names a Hugging Face folder; model.init=random draws new weights",
        )
    return Start("init", Path(recipe.model.path), f"new run in {run}, weights from {recipe.model.path}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked recipe: everything that can be wrong has been looked at, and no GPU has been touched."""

    recipe: Recipe
    start: Start
    ranks: Ranks
    plan: models.Blueprint
    train_rows: Rows | None
    eval_rows: Rows | None


def prepare(recipe: Recipe, init_from: str | None = None, resume: bool = False) -> Prepared:
    """Check a recipe against this machine, its model and its data; MbxError says what is wrong."""
    start = decide(recipe, init_from, resume)
    ranks = planned_ranks(recipe)
    check_fp8(recipe, ranks)
    plan = models.blueprint(recipe)
    if plan.config.get("gradient_accumulation_fusion"):
        _check_apex()
    if recipe.lora.rank:
        from mbx.train.lora import check_lora

        check_lora(recipe, plan)
    train_rows, eval_rows = _read_rows(recipe, plan, ranks)
    return Prepared(recipe, start, ranks, plan, train_rows, eval_rows)


def _check_apex() -> None:
    import importlib.util

    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        raise DeviceError(
            "gradient_accumulation_fusion=true needs Apex, which is not installed",
            hint="model.config.gradient_accumulation_fusion=false",
        )


def _read_rows(recipe: Recipe, plan: models.Blueprint, ranks: Ranks) -> tuple[Rows | None, Rows | None]:
    """Train and validation rows; those of Megatron Core's datasets need the process group and come later."""
    d = recipe.data
    if d.kind == "pattern":
        return datasets.Pattern(plan.vocab, d.length, d.seed), datasets.Pattern(plan.vocab, d.length, d.seed + 1)
    if d.kind in ("mock", "indexed"):
        return None, None
    if not d.path:
        raise UsageError(f"data.kind `{d.kind}` needs a file", hint="data=FILE.jsonl")
    packs = d.pack and d.kind != "text"
    if packs and recipe.parallel.cp > 1:
        raise UsageError("packed rows cannot be cut by context parallelism", hint="data.pack=false or parallel.cp=1")
    tokenizer = models.load_tokenizer(plan)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def rows(path: str) -> Rows:
        return datasets.example_rows(d, datasets.read_examples(d, Path(path), tokenizer), int(pad or 0))

    return rows(d.path), rows(d.eval_path) if d.eval_path else None


def train(prepared: Prepared, *, live: bool = True, on_step: Callable[[Step], None] = lambda _: None) -> Outcome:
    """Run a prepared recipe to its end, to SIGTERM, or to a loss that is not a number; collective over all ranks."""
    recipe, ranks = prepared.recipe, prepared.ranks
    with session(recipe, ranks):
        log = Log(recipe, main=ranks.is_main, live=live)
        try:
            return _Trainer(prepared, log, on_step).run()
        except _out_of_memory() as error:
            raise _explain_memory(prepared, error) from error
        finally:
            log.close()


class _Trainer:
    """One run inside its session: builds everything once, then steps."""

    def __init__(self, prepared: Prepared, log: Log, on_step: Callable[[Step], None]) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_model_config

        from mbx.train import checkpoint, start

        self.prepared, self.recipe, self.ranks, self.plan = prepared, prepared.recipe, prepared.ranks, prepared.plan
        self.log, self.on_step = log, on_step
        log.message(prepared.start.why)

        # 1. the model, with this rank's weights read straight from their storage
        network = models.build(self.recipe, self.plan, self.ranks)
        if prepared.start.how == "init":
            assert prepared.start.path is not None
            report = start.load_weights(models.unwrap(network), self.plan, prepared.start.path)
            log.message(report)
        if self.recipe.lora.rank:
            from mbx.train import lora

            lora.attach(models.unwrap(network), self.recipe.lora, self.plan, self.recipe.train.seed)
            if prepared.start.how == "resume":  # the frozen base is in no checkpoint of an adapter run
                log.message(start.load_weights(models.unwrap(network), self.plan, lora.base_of(self.recipe)))
            if self.recipe.lora.adapter and prepared.start.how != "resume":
                from mbx.train.peft import load_peft

                load_peft(models.unwrap(network), self.plan, Path(self.recipe.lora.adapter))

        # 2. gradients, optimizer, schedules
        self.model: DistributedDataParallel = models.wrap(self.recipe, network, self.ranks)
        self.optimizer: MegatronOptimizer = models.optimizer(self.recipe, self.model, self.ranks)
        config = get_model_config(self.model)
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = _finalizer()
        if self.model.ddp_config.overlap_grad_reduce:
            config.no_sync_func = self.model.no_sync
        self.forward_backward = get_forward_backward_func()
        self.mark_first = models.first_microbatch(self.model)

        # 3. rows, and the place in them
        self.train_rows, self.eval_rows = self._rows()
        self.store = checkpoint.Store(self.recipe, self.plan, self.ranks)
        self.step, self.saved, self.mean_loss = 0, -1, math.nan
        if prepared.start.how == "resume":
            assert prepared.start.path is not None
            state = self.store.load(prepared.start.path, self.model, self.optimizer)
            self.step, self.saved, self.mean_loss = state.step, state.step, state.mean_loss
        self.flops = models.flops_per_token(
            self.plan.config, self.recipe.data.length, self.plan.padded_vocab, self.recipe.lora.rank > 0
        )

    def _rows(self) -> tuple[Rows, Rows | None]:
        if self.prepared.train_rows is not None:
            return self.prepared.train_rows, self.prepared.eval_rows
        t = self.recipe.train
        rounds = t.steps // t.eval_every + 1 if t.eval_every else 0
        return datasets.megatron_rows(
            self.recipe.data, self.plan.vocab, t.steps * t.global_batch, rounds * t.eval_steps * t.global_batch
        )

    def run(self) -> Outcome:
        """Step to the end; save on the way, at the end, and on SIGTERM."""
        import torch

        t, r = self.recipe.train, self.recipe.run
        first, losses, stopped = self.step, [], "finished"
        if self.ranks.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with _Stop() as stop:
            while self.step < t.steps:
                figures = self._one_step()
                losses.append(figures.loss)
                self.log.step(figures)
                self.on_step(figures)
                self._check_loss(figures)
                if t.eval_every and self.step % t.eval_every == 0 and self.eval_rows is not None:
                    self.log.evaluation(self.step, self._evaluate())
                if self._any(stop.asked):
                    stopped = "stopped by SIGTERM"
                    break
                if r.save and r.save_every and self.step % r.save_every == 0 and self.step < t.steps:
                    self._save()
        if r.save and self.step != self.saved:
            self._save()
        self.log.message(
            f"{stopped} at step {self.step}" + (f"; checkpoint in {self.recipe.run_dir}" if r.save else "")
        )
        self._compare_memory()
        return Outcome(self.recipe.run_dir, first, tuple(losses), stopped)

    def _one_step(self) -> Step:
        """One optimizer step over a global batch."""
        import torch

        t = self.recipe.train
        began = time.perf_counter()
        lr = learning_rate(self.recipe.optim, self.step, t.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.mark_first()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, tokens = self._forward_backward(self.train_rows, self.step, forward_only=False)
        if math.isfinite(loss):
            updated, grad_norm, _ = self.optimizer.step()
            grad_norm = float(grad_norm or 0.0)
            if not updated:  # fp16: the scaler met an infinity, lowered its scale and skipped the step
                self.log.message(f"step {self.step + 1}: skipped, gradients overflowed fp16")
        else:
            grad_norm = math.nan  # nothing is updated: the checkpoint stays good
        if self.ranks.device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        self.step += 1
        tflops = tokens * self.flops / took / self.ranks.world_size / 1e12
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.ranks.device == "cuda" else _host_memory_gib()
        return Step(self.step, loss, lr, grad_norm, tokens, took, tokens / took, tflops, tflops / self._peak(), memory)

    def _peak(self) -> float:
        """Peak TFLOP/s of this GPU at the run's precision; infinite, for an MFU of 0, where it is not known."""
        import torch

        if self.ranks.device != "cuda" or self.recipe.train.precision == "fp32":
            return math.inf
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in _PEAK_TFLOPS.items() if key in name), math.inf)
        return peak * (2 if self.recipe.fp8.recipe != "none" else 1)

    def _forward_backward(self, rows: Rows, step: int, *, forward_only: bool) -> tuple[float, int]:
        """Run one global batch through Megatron Core's schedule; returns its mean loss and its number of tokens."""
        import torch
        from megatron.core import parallel_state as ps

        t = self.recipe.train
        batches = self._batches(rows, step)
        length, micro = self.recipe.data.length, t.micro_batch
        if self.ranks.te and self.recipe.data.kind in ("chat", "completion") and self.recipe.data.pack:
            length, micro = length * micro, 1  # packed rows travel between stages as one
        results = self.forward_backward(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=t.global_batch // (t.micro_batch * self.ranks.dp),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=forward_only,
        )
        total = torch.zeros(2, dtype=torch.float64 if self.ranks.device == "cpu" else torch.float32)
        total = total.to(self.ranks.device)
        if ps.is_pipeline_last_stage():
            sums = torch.stack([r["loss"] for r in results]).to(total.dtype)
            # per token: Σ loss / Σ tokens; else the mean over micro-batches of their means, as Megatron-LM reports it
            per_batch = torch.stack((sums[:, 0] / sums[:, 1].clamp(min=1), torch.ones_like(sums[:, 0])), dim=1)
            total = (sums if t.per_token_loss else per_batch).sum(0)
            torch.distributed.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        if self.recipe.parallel.pp > 1:
            last = ps.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(total, src=last, group=ps.get_pipeline_model_parallel_group())
        return float(total[0] / total[1].clamp(min=1)), t.global_batch * self.recipe.data.length

    def _batches(self, rows: Rows, step: int) -> Iterator[Batch]:
        from megatron.core import parallel_state as ps

        t = self.recipe.train
        for micro in datasets.micro_batches(
            rows,
            step,
            global_batch=t.global_batch,
            micro_batch=t.micro_batch,
            dp=self.ranks.dp,
            dp_rank=ps.get_data_parallel_rank(),
        ):
            yield _to_device(micro, self.ranks, self.recipe.parallel.cp)

    def _evaluate(self) -> float:
        """Mean validation loss over `eval_steps` global batches."""
        import torch

        assert self.eval_rows is not None
        self.model.eval()
        with torch.no_grad():
            losses = [
                self._forward_backward(self.eval_rows, n, forward_only=True)[0]
                for n in range(self.recipe.train.eval_steps)
            ]
        self.model.train()
        return sum(losses) / len(losses)

    def _compare_memory(self) -> None:
        """Log predicted beside measured peak memory."""
        import torch

        from mbx.train.budget import GIB, predict

        if self.ranks.device != "cuda":
            return
        try:
            predicted = predict(self.recipe, self.plan, self.ranks.dp).total
        except UnsupportedError as error:
            self.log.message(error.fact)
            return
        measured = torch.cuda.max_memory_allocated()
        self.log.note(kind="memory", predicted_bytes=predicted, measured_bytes=measured)
        self.log.message(
            f"peak memory {measured / GIB:.2f} GiB, predicted {predicted / GIB:.2f} ({predicted / measured - 1:+.1%})"
        )

    def _check_loss(self, figures: Step) -> None:
        """Stop on a loss that is not finite, or that leaves the running mean behind."""
        loss, factor = figures.loss, self.recipe.train.spike_factor
        if not math.isfinite(loss):
            raise DifferenceError(
                f"step {figures.step}: the loss is {loss}; weights were not updated by it",
                hint="--resume continues from the last checkpoint; a lower optim.lr may help",
            )
        if factor and loss > factor * self.mean_loss:
            raise DifferenceError(
                f"step {figures.step}: the loss {loss:.4f} is more than train.spike_factor {factor:g} times its "
                f"running mean {self.mean_loss:.4f}",
                hint="--resume continues from the last checkpoint",
            )
        self.mean_loss = loss if math.isnan(self.mean_loss) else 0.95 * self.mean_loss + 0.05 * loss

    def _save(self) -> None:
        from mbx.train.checkpoint import LoopState

        self.store.save(LoopState(self.step, self.mean_loss), self.model, self.optimizer)
        self.saved = self.step

    def _any(self, flag: bool) -> bool:
        """Whether any rank was told to stop: they must all stop at the same step."""
        import torch

        told = torch.tensor([1.0 if flag else 0.0], device=self.ranks.device)
        torch.distributed.all_reduce(told)
        return bool(told.item() > 0)


def _forward_step(batches: Iterator[Batch], model: nn.Module) -> tuple[torch.Tensor, Callable[..., object]]:
    """One micro-batch: per-token losses [b, s], and how to reduce them."""
    import torch

    batch = next(batches)
    arguments: dict[str, object] = {}
    if batch["cu_seqlens"] is not None:
        from megatron.core.packed_seq_params import PackedSeqParams

        ends = batch["cu_seqlens"]
        longest = int((ends[1:] - ends[:-1]).max())
        arguments["packed_seq_params"] = PackedSeqParams(
            "thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
    output = model(batch["tokens"], batch["positions"], batch["attention_mask"], labels=batch["labels"], **arguments)
    mask = batch["mask"]
    assert mask is not None

    def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = torch.sum(losses.view(-1).float() * mask.view(-1))
        tokens = mask.sum()
        return total, tokens.to(torch.int), {"loss": torch.stack((total.detach(), tokens))}

    return output, reduce


def _to_device(rows: list[Row], ranks: Ranks, cp: int) -> Batch:
    """A micro-batch as tensors [b, s]; packed rows as one long row with `cu_seqlens`, or with a mask where the
    local attention has no such kernel."""
    import numpy as np
    import torch

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows])).to(ranks.device)

    batch = {name: stack(name) for name in ("tokens", "labels", "mask", "positions")}
    extra: dict[str, torch.Tensor | None] = {"attention_mask": None, "cu_seqlens": None}
    if rows[0].lengths:
        lengths = np.concatenate([np.asarray(row.lengths, np.int64) for row in rows])
        if ranks.te:
            ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            extra["cu_seqlens"] = torch.from_numpy(ends).to(ranks.device)
            batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        else:
            owner = torch.stack([torch.from_numpy(np.repeat(np.arange(len(r.lengths)), r.lengths)) for r in rows])
            length = owner.shape[1]
            hidden = (owner[:, :, None] != owner[:, None, :]) | torch.ones(length, length, dtype=torch.bool).triu(1)
            extra["attention_mask"] = hidden[:, None].to(ranks.device)  # [b, 1, s, s], True is hidden
    if cp > 1:
        from megatron.core.utils import get_batch_on_this_cp_rank

        batch = get_batch_on_this_cp_rank(batch)
    return batch | extra


def _out_of_memory() -> type[BaseException]:
    import torch

    return torch.cuda.OutOfMemoryError


def _explain_memory(prepared: Prepared, error: BaseException) -> DeviceError:
    """An out-of-memory error as a fact: what was predicted, what is there, and what would help."""
    import torch

    from mbx.train.budget import GIB, lines, predict, suggestions

    free, total = torch.cuda.mem_get_info()
    reached = torch.cuda.max_memory_allocated()
    budget = predict(prepared.recipe, prepared.plan, prepared.ranks.dp)
    tips = suggestions(prepared.recipe, prepared.plan, prepared.ranks.dp)
    if budget.total > total:
        why = (
            f"the budget of {budget.total / GIB:.1f} GiB exceeds this GPU: the batch or the model is too large for it"
        )
    elif total - free - torch.cuda.memory_reserved() > 2 * GIB:
        why = f"{(total - free - torch.cuda.memory_reserved()) / GIB:.1f} GiB of this GPU are held by other processes"
    else:
        why = f"{reached / GIB:.1f} GiB were reached, the budget was {budget.total / GIB:.1f} GiB: a part outgrew it"
    return DeviceError(
        f"out of memory on a GPU of {total / GIB:.0f} GiB: {why}",
        hint=f"{tips[0][0]} would save {tips[0][1] / GIB:.1f} GiB" if tips else None,
        details=[*lines(budget, tips), str(error)],
    )


def _finalizer() -> Callable[..., None]:
    """Megatron Core's reduction of gradients over data, tensor (sequence) and pipeline (tied embedding) ranks."""
    from megatron.core.distributed import finalize_model_grads

    function: Callable[..., None] = finalize_model_grads
    return function


def _host_memory_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Stop(contextlib.AbstractContextManager["_Stop"]):
    """Notes SIGTERM instead of dying of it, so that a step ends and a checkpoint is written."""

    def __init__(self) -> None:
        self.asked = False
        self._before: object = None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.asked = True

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]
