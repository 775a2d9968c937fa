"""`mbx budget`: the memory a recipe needs on each rank, before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out

EPILOG = epilog(
    "mbx budget --recipe llama3_8b_lora",
    "mbx budget --recipe llama3_8b_sft --world-size 8 parallel.tp=2",
)


@grouped
def budget(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    recipe: Annotated[str, typer.Option("--recipe", metavar="NAME", help="A shipped recipe or a .toml file.")] = ...,  # type: ignore[assignment]
    world_size: Annotated[
        int | None, typer.Option("--world-size", metavar="N", help="Number of GPUs (default: the fewest that fit).")
    ] = None,
    *,
    output: Output,
) -> None:
    """Predict the peak memory of a rank, by part, and what would lower it."""
    output.configure()
    from mbx.train.budget.predict import CONTEXT, lines, predict, suggestions
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.train.recipe.world import check_world, smallest_world

    chosen = load_recipe(recipe, overrides or ())
    dp = check_world(chosen, smallest_world(chosen) if world_size is None else world_size)
    plan = blueprint(chosen)
    found = predict(chosen, plan, dp)
    tips = suggestions(chosen, plan, dp)
    out.result(
        {
            "recipe": chosen.name,
            "stage": found.stage,
            "parameters": found.counts.base,
            "adapters": found.counts.adapters,
            "bytes": dict(found.parts),
            "total_bytes": found.total,
            "context_bytes": CONTEXT,
            "suggestions": [{"override": name, "saves_bytes": saved} for name, saved in tips],
        },
        lambda: lines(found, tips),
    )
