"""Where a run's first weights come from: a folder, a seed, or a checkpoint of its own that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.errors import StorageError, UsageError
from mbx.formats.adapter_folder import is_adapter
from mbx.formats.torch_dist import TRACKER, find_iteration
from mbx.train.checkpoints.state import finished, latest
from mbx.train.recipe.sections import Recipe
from mbx.train.run.log import only_begun


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: `how` is `init` (weights from `path`), `random`, or `resume` (everything from `path`)."""

    how: str
    path: Path | None
    why: str


def decide(recipe: Recipe, init_from: str | None, resume: bool, anew: bool = False) -> Start:
    """Where this run starts, and why; UsageError or StorageError where that is not possible or not clear.

    `anew`: what a start left that ended before its first checkpoint is in nobody's way.
    """
    run, found = recipe.run_dir, continued_at(recipe.run_dir) if anew else latest(recipe.run_dir)
    used = run.is_dir() and any(run.iterdir()) and not (anew and only_begun(run))
    again = "it holds no checkpoint: remove it, or run.dir=NAME starts another"
    if not found and (lost := finished(run)):
        number = int(lost[-1].name.removeprefix("iter_"))
        again = f"its tracker is gone: echo {number} > {run / TRACKER} makes ‹resume› continue from {lost[-1].name}"
    if init_from and resume:
        raise UsageError("‹init-from› starts a new run and ‹resume› continues one: give one of them")
    if resume:
        if found is None:
            hint = again if used else "leave ‹resume› out to start the run"
            raise StorageError(f"‹resume›: `{run}` has no checkpoint that its tracker names", hint=hint)
        return Start("resume", found, f"resuming {run} at {found.name}")
    if used:
        hint = "‹resume› continues it; run.dir=NAME starts another" if found else again
        raise UsageError(f"the run folder `{run}` is not empty", hint=hint)
    if init_from:
        if not Path(init_from).is_dir():
            what = "is no folder" if Path(init_from).exists() else "does not exist"
            raise StorageError(f"‹init-from›: `{init_from}` {what}")
        if is_adapter(init_from):
            raise UsageError(
                f"‹init-from›: `{init_from}` holds adapters, and lora.rank 0 trains every weight",
                hint="lora.rank=N continues them on model.path; `mbx convert merge` makes a base that includes them",
            )
        # by the iteration: a run that goes on has another one later, and an adapter's base is read again
        path = find_iteration(Path(init_from)) or Path(init_from)
        return Start("init", path, f"new run in {run}, weights from {path}")
    if recipe.model.init == "random":
        if recipe.lora.rank and recipe.run.save:
            raise UsageError(
                "adapters on random weights cannot be resumed or merged: no checkpoint holds their base",
                hint="model.init=pretrained, or ‹init-from› DIR; run.save=false trains without checkpoints",
            )
        return Start("random", None, f"new run in {run}, random weights (seed {recipe.train.seed})")
    if not recipe.model.path:
        raise UsageError(
            f"recipe `{recipe.name}` trains pretrained weights, and no model is named",
            hint="model=DIR names a Hugging Face folder; model.init=random draws new weights",
        )
    adapter = f", adapters from {recipe.lora.adapter}" if recipe.lora.adapter else ""
    return Start("init", Path(recipe.model.path), f"new run in {run}, weights from {recipe.model.path}{adapter}")


def continued_at(run: Path) -> Path | None:
    """The checkpoint that a run goes on from: its tracker's, or a whole one that a start left without a tracker."""
    return latest(run) or next(reversed(finished(run)), None)
