"""How many processes a recipe needs, and how a world of them is shared out."""

from __future__ import annotations

import math

from converters.errors import UsageError
from mbx.train.recipe.sections import Recipe


def smallest_world(recipe: Recipe) -> int:
    """Fewest processes in which every parallel axis of the recipe has its size."""
    p = recipe.parallel
    return math.lcm(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp)


def check_world(recipe: Recipe, world_size: int) -> int:
    """Data-parallel size of the recipe in a world of `world_size` ranks; UsageError where it does not divide."""
    p, t = recipe.parallel, recipe.train
    model = p.tp * p.pp * p.cp
    if world_size < 1:
        raise UsageError(f"a world has at least one process, got {world_size}")
    for size, axes in (
        (model, f"tp {p.tp} x pp {p.pp} x cp {p.cp} = {model}"),
        (p.etp * p.ep * p.pp, f"etp {p.etp} x ep {p.ep} x pp {p.pp}"),
    ):
        if world_size % size:
            raise UsageError(
                f"{axes} does not divide the world of {world_size} process(es)",
                hint=f"torchrun --nproc-per-node {smallest_world(recipe)} -m mbx train …",
            )
    dp = world_size // model
    rows = t.micro_batch * dp
    rounds, rest = divmod(t.global_batch, rows)
    if rest:
        raise UsageError(
            f"train.global_batch {t.global_batch} is not a multiple of train.micro_batch {t.micro_batch} x dp {dp}",
            hint=f"train.global_batch={(rounds + 1) * rows}",
        )
    if p.vpp > 1 and (rounds < p.pp or rounds % p.pp):
        raise UsageError(
            f"interleaved stages need a multiple of parallel.pp {p.pp} micro-batches a step, the recipe has {rounds}",
            hint=f"train.global_batch={rows * p.pp * max(1, -(-rounds // p.pp))}",
        )
    return dp
