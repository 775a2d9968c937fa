"""`mbx train`: run a recipe, export what it trained, draw what it did."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.errors import UsageError
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out

if TYPE_CHECKING:
    from mbx.train.prepare import Prepared
    from mbx.train.recipe import Recipe

EPILOG = epilog(
    "mbx train --recipe llama32_1b_lora model=./Llama-3.2-1B data=chat.jsonl",
    "torchrun --nproc-per-node 2 -m mbx train --recipe NAME parallel.tp=2",
    "mbx train --recipe llama32_1b_lora model=DIR data=chat.jsonl --resume",
    "mbx train export runs/llama32_1b_lora out-folder",
    "mbx train report runs/llama32_1b_lora",
)


@grouped
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides; or `report RUN [FILE]`, or `export RUN DST`."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME", help="A shipped recipe's name or a .toml file.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", metavar="DIR", help="Take the first weights from here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in its folder, exactly.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with overrides applied.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan; train nothing.")
    ] = False,
    merged: Annotated[bool, typer.Option("--merged", help="With export: adapters merged into the base.")] = False,
    *,
    output: Output,
) -> None:
    """Train a model with Megatron Core, from a Hugging Face folder to one."""
    rank = int(os.environ.get("RANK", "0"))
    replace(output, quiet=output.quiet + (2 if rank else 0)).configure()  # rank 0 speaks for all
    output.hush()
    words = words or []
    runs = {"--recipe": recipe, "--init-from": init_from, "--resume": resume, "--show": show, "--dry-run": dry_run}
    if words[:1] in (["report"], ["export"]) and (given := [option for option, value in runs.items() if value]):
        raise UsageError(f"`mbx train {words[0]}` takes no {given[0]}", hint="it reads a run's folder")
    if merged and words[:1] != ["export"]:
        raise UsageError("--merged is for `mbx train export`", hint="mbx train export RUN DST --merged")
    if list_:
        _list()
    elif words[:1] == ["report"]:
        _report(words[1:])
    elif words[:1] == ["export"]:
        _export(words[1:], merged=merged)
    else:
        _train(recipe, words, init_from, resume, show=show, dry_run=dry_run)


def _list() -> None:
    from mbx.text import aligned
    from mbx.train.catalogue import load_recipe, recipe_names

    rows = [(name, load_recipe(name).description) for name in recipe_names()]
    out.result({"recipes": [{"name": n, "description": d} for n, d in rows]}, lambda: aligned(rows))


def _report(words: list[str]) -> None:
    from mbx.train.report import write_report

    if not 1 <= len(words) <= 2:
        raise UsageError("`mbx train report` takes a run folder and, if you like, a file", hint="mbx train report RUN")
    path = write_report(Path(words[0]), Path(words[1]) if len(words) > 1 else None)
    out.result({"report": str(path)}, lambda: [str(path)])


def _export(words: list[str], *, merged: bool) -> None:
    from mbx.train.export import export_run

    if len(words) != 2:
        raise UsageError("`mbx train export` takes a run folder and a destination", hint="mbx train export RUN DST")
    path, kind = export_run(Path(words[0]), Path(words[1]), merged=merged)
    out.result({"export": str(path), "kind": kind}, lambda: [f"{path}: {kind}"])


def _train(
    name: str | None, overrides: list[str], init_from: str | None, resume: bool, *, show: bool, dry_run: bool
) -> None:
    from mbx.train.catalogue import load_recipe

    if name is None:
        raise UsageError("no recipe is named", hint="mbx train --list shows them; --recipe NAME takes one")
    recipe = load_recipe(name, overrides)
    if show:
        out.result(recipe.to_dict(), lambda: _shown(recipe))
        return
    from mbx.train.loop import train
    from mbx.train.prepare import prepare

    recipe = _fetched(recipe)
    prepared = prepare(recipe, init_from, resume, dry=dry_run)
    if dry_run:
        out.result(_planned(prepared), lambda: _plan_lines(prepared))
        return
    done = train(prepared, live=out.shows_progress)
    last = done.losses[-1] if done.losses else None
    out.result(
        {"run": str(done.run_dir), "stopped": done.stopped, "steps": done.first_step + len(done.losses), "loss": last},
        lambda: [f"{done.run_dir}: {done.stopped}" + ("" if last is None else f", loss {last:.4f}")],
    )


def _fetched(recipe: Recipe) -> Recipe:
    """The recipe with a hub model's id replaced by its folder in the cache."""
    if not recipe.model.path or Path(recipe.model.path).is_dir():
        return recipe
    from mbx.cli.source import fetch

    return replace(recipe, model=replace(recipe.model, path=str(fetch(recipe.model.path).path)))


def _shown(recipe: Recipe) -> list[str]:
    lines = [f"name = {recipe.name!r}", f"description = {recipe.description!r}"]
    for section, values in recipe.to_dict().items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return lines


def _toml(value: object) -> str:
    import json

    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _planned(prepared: Prepared) -> dict[str, object]:
    from converters.errors import UnsupportedError
    from mbx.train.budget import predict

    try:
        budget = predict(prepared.recipe, prepared.plan, prepared.ranks.dp)
        memory: dict[str, object] = {
            "parameters": budget.counts.base,
            "adapters": budget.counts.adapters,
            "memory_bytes": dict(budget.parts),
            "memory_total_bytes": budget.total,
        }
    except UnsupportedError as error:
        memory = {"memory_unknown": error.fact}
    return {
        "start": prepared.start.why,
        "world_size": prepared.ranks.world_size,
        "dp": prepared.ranks.dp,
        "device": prepared.ranks.device,
        **memory,
        "recipe": prepared.recipe.to_dict(),
    }


def _plan_lines(prepared: Prepared) -> list[str]:
    recipe, ranks = prepared.recipe, prepared.ranks
    axes = ", ".join(f"{axis} {getattr(recipe.parallel, axis)}" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp"))
    return [
        prepared.start.why,
        f"{recipe.train.steps} steps of {recipe.train.global_batch} x {recipe.data.length} tokens in "
        f"{recipe.train.precision}" + ("" if recipe.fp8.recipe == "none" else f", FP8 {recipe.fp8.recipe}"),
        f"{ranks.world_size} process(es) on {ranks.device}: {axes}, dp {ranks.dp}",
        *_budget_lines(prepared),
    ]


def _budget_lines(prepared: Prepared) -> list[str]:
    from converters.errors import UnsupportedError
    from mbx.train.budget import lines, predict, suggestions
    from mbx.train.model import human

    try:
        budget = predict(prepared.recipe, prepared.plan, prepared.ranks.dp)
    except UnsupportedError as error:
        return [error.fact]
    c, tips = budget.counts, suggestions(prepared.recipe, prepared.plan, prepared.ranks.dp)
    weights = f"{human(c.base)} weights a rank" + (f", {human(c.adapters)} of adapters" if c.adapters else "")
    return [weights, *lines(budget, tips)]
