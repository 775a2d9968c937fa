"""`mbx train matrix`: a recipe beside Transformers and PEFT on this machine, one setting changed at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.errors import DifferenceError, UsageError
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out
from mbx.cli.recipes import RecipeName, Words, named
from mbx.cli.train import app

if TYPE_CHECKING:
    from mbx.train.recipe.sections import Recipe


__all__ = ["app", "matrix"]


def _words(text: str | None) -> list[str]:
    return [word for word in (text or "").split(",") if word]


@dataclass(frozen=True)
class Values:
    """What is tried of each setting, besides the recipe's own; separated by commas."""

    length: Annotated[str | None, typer.Option("--length", metavar="N,…", help="Tokens of a row.")] = None
    micro_batch: Annotated[str | None, typer.Option("--micro-batch", metavar="N,…", help="Rows at once.")] = None
    recompute: Annotated[str | None, typer.Option("--recompute", metavar="WORD,…", help="none, selective, full.")] = (
        None
    )
    fp8: Annotated[str | None, typer.Option("--fp8", metavar="WORD,…", help="none, tensorwise, …")] = None
    tp: Annotated[str | None, typer.Option("--tp", metavar="N,…", help="Tensor parallelism.")] = None


@app.command(
    "matrix",
    epilog=epilog(
        "mbx train matrix --recipe llama32_1b_lora model=DIR data=chat.jsonl",
        "mbx train matrix --recipe qwen3_8b_lora model=DIR --tp 1,2 --fp8 none",
    ),
)
@grouped
def matrix(
    words: Words = None,
    recipe: RecipeName = None,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder of the results.")] = Path("matrix"),
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Steps of a run.")] = 10,
    limit: Annotated[float, typer.Option("--limit", metavar="SECONDS", min=1, help="Longest time of a run.")] = 1800,
    *,
    values: Values,
    output: Output,
) -> None:
    """Compare a recipe with Transformers and PEFT, and change one setting at a time."""
    output.configure()
    output.hush()
    from mbx.page import write
    from mbx.train.matrix.cells import cells, default_values
    from mbx.train.matrix.page import matrix_page
    from mbx.train.matrix.runner import line, run_matrix
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.untrusted.names import writable

    recipe, overrides = named(recipe, words or [])
    chosen = load_recipe(recipe, overrides)
    given = {field.name: _words(getattr(values, field.name)) for field in fields(values)}
    asked = {word: found for word, found in given.items() if found}
    gpus, casts = _hardware(chosen)
    planned = cells(chosen, asked or default_values(chosen, gpus, casts), has_folder=bool(chosen.model.path))
    if too_many := [cell.name for cell in planned if cell.world_size > max(gpus, 1) and gpus]:
        raise UsageError(f"{', '.join(too_many)}: more processes than the {gpus} GPUs here", hint="‹tp› 1 needs one")
    records = run_matrix(to, recipe, overrides, planned, steps, out.message, limit)
    t = chosen.train
    setting = f"`{recipe} {' '.join(overrides)}`: {steps} steps of {t.global_batch} x {chosen.data.length} tokens"
    write(writable(to, "matrix.html"), matrix_page(f"{chosen.name}: matrix", setting, records))
    writable(to, "matrix.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    brief = [{k: v for k, v in record.items() if k != "memory_over_time"} for record in records]
    out.result({"matrix": str(to), "cells": brief}, lambda: [*map(line, records), str(to / "matrix.html")])
    if failed := [record["cell"]["name"] for record in records if record["status"] == "failed"]:
        raise DifferenceError(f"{len(failed)} of {len(records)} runs failed: {', '.join(failed)}")


def _hardware(recipe: Recipe) -> tuple[int, list[str]]:
    """GPUs that runs may use, and the FP8 recipes that those take."""
    import importlib.util

    import torch

    from mbx.train.budget.devices import Device
    from mbx.train.budget.fit import casts

    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return 0, []
    gpu = Device("this", 0, 0, torch.cuda.get_device_capability())
    able = importlib.util.find_spec("transformer_engine") is not None
    return torch.cuda.device_count(), casts(gpu, recipe) if able else []
