"""Checks a recipe against this machine, its model and its data, before a process group or a GPU is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import DeviceError, StorageError, UnsupportedError, UsageError
from mbx.train import data as datasets
from mbx.train import model as models
from mbx.train.examples import read_examples
from mbx.train.flat import sequence_parallel
from mbx.train.fp8 import check_fp8
from mbx.train.log import check_writers
from mbx.train.parallel import Ranks, planned_ranks
from mbx.train.recipe import Recipe

if TYPE_CHECKING:
    from mbx.train.data import Rows


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: `how` is `init` (weights from `path`), `random`, or `resume` (everything from `path`)."""

    how: str
    path: Path | None
    why: str


def decide(recipe: Recipe, init_from: str | None, resume: bool) -> Start:
    """Where this run starts, and why; UsageError or StorageError where that is not possible or not clear."""
    from mbx.train.checkpoint import latest

    run, found = recipe.run_dir, latest(recipe.run_dir)
    used = run.is_dir() and any(run.iterdir())
    again = "it holds no checkpoint: remove it, or run.dir=NAME starts another"
    if init_from and resume:
        raise UsageError("--init-from starts a new run and --resume continues one: give one of them")
    if resume:
        if found is None:
            hint = again if used else "leave --resume out to start the run"
            raise StorageError(f"--resume: `{run}` holds no checkpoint", hint=hint)
        return Start("resume", found, f"resuming {run} at {found.name}")
    if used:
        hint = "--resume continues it; run.dir=NAME starts another" if found else again
        raise UsageError(f"the run folder `{run}` is not empty", hint=hint)
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


def prepare(recipe: Recipe, init_from: str | None = None, resume: bool = False, *, dry: bool = False) -> Prepared:
    """Check a recipe against this machine, its model and its data; MbxError says what is wrong.

    `dry`: nothing will be trained, so the processes need not be there.
    """
    start = decide(recipe, init_from, resume)
    # before the ranks: a size that does not divide the model is no matter of processes
    plan = models.blueprint(recipe)
    if plan.table is not None and plan.table.unsupported:
        raise UnsupportedError(
            f"another model would be trained: {plan.table.unsupported}",
            hint="conversions of this family carry its weights; no training does",
        )
    ranks = planned_ranks(recipe, dry=dry)
    check_fp8(recipe, ranks)
    check_writers(recipe)
    _check_axes(recipe, plan, ranks, dry)
    if plan.config.get("gradient_accumulation_fusion"):
        _check_apex()
    if recipe.lora.rank:
        from mbx.train.lora import check_lora

        check_lora(recipe, plan)
    train_rows, eval_rows = _read_rows(recipe, plan, ranks)
    return Prepared(recipe, start, ranks, plan, train_rows, eval_rows)


def _check_axes(recipe: Recipe, plan: models.Blueprint, ranks: Ranks, dry: bool) -> None:
    """Refuse axes that these rows, this device or this model have no kernels for."""
    if recipe.parallel.cp > 1 and _packs(recipe):
        raise UsageError("packed rows cannot be cut by context parallelism", hint="data.pack=false or parallel.cp=1")
    if recipe.parallel.cp > 1 and not ranks.te:
        raise DeviceError(
            f"parallel.cp={recipe.parallel.cp} needs the attention of Transformer Engine, on a GPU",
            hint="parallel.cp=1",
        )
    shared = recipe.parallel.sequence_parallel if dry else sequence_parallel(recipe, ranks)
    if plan.config.get("num_moe_experts") and recipe.parallel.tp > 1 and not shared:
        raise DeviceError(
            f"parallel.tp={recipe.parallel.tp}: Megatron Core trains experts under tensor parallelism with sequence "
            "parallelism only, which needs GPUs and parallel.sequence_parallel=true",
            hint="parallel.tp=1; parallel.ep shares the experts out",
        )


def _packs(recipe: Recipe) -> bool:
    return recipe.data.pack and recipe.data.kind in ("chat", "completion")


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
    tokenizer = models.load_tokenizer(plan)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def rows(path: str) -> Rows:
        return datasets.example_rows(d, read_examples(d, Path(path), tokenizer), int(pad or 0))

    return rows(d.path), rows(d.eval_path) if d.eval_path else None
