"""`mbx train logits`: what a teacher says of a recipe's rows, written once for students to come."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out
from mbx.cli.recipes import RecipeName, Words, named
from mbx.cli.running import warn_of_unknown_core
from mbx.cli.train import app, fetched
from mbx.extras import require
from mbx.text import human_count

__all__ = ["app", "logits"]


@app.command(
    "logits",
    epilog=epilog(
        "mbx train logits --recipe NAME distill.top_k=64 --teacher DIR --out words",
        "torchrun --nproc-per-node 8 -m mbx train logits NAME --out words",
    ),
)
@grouped
def logits(
    words: Words = None,
    recipe: RecipeName = None,
    *,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="DIR", help="The teacher (default: the recipe's distill.teacher)."),
    ] = None,
    target: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    output: Output,
) -> None:
    """Write a teacher's likeliest tokens for every row that a recipe trains on."""
    rank = int(os.environ.get("RANK", "0"))
    replace(output, quiet=output.quiet + (2 if rank else 0)).configure()  # rank 0 speaks for all
    output.hush()
    require("train", "`mbx train logits`")
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.train.run.logits import prepared_for, write_logits

    warn_of_unknown_core()
    name, overrides = named(recipe, words or [])
    overrides += [] if teacher is None else [f"distill.teacher={teacher}"]
    chosen = load_recipe(name, overrides)
    found = write_logits(prepared_for(fetched(chosen), target), target, out.message)
    said = (
        f"{target}: {found.top_k} of {human_count(found.vocabulary)} tokens for each of {human_count(found.learned)}"
    )
    out.result({"logits": str(target), **asdict(found)}, lambda: [f"{said} that are learned, in {found.rows} rows"])
