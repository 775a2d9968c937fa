"""Products whose sides the blocks of a scaling do not divide, by name and before anything is built."""

from __future__ import annotations

from converters.errors import UsageError
from mbx.train.budget.adapters import sizes_of
from mbx.train.budget.shape import shape_of
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.fp8 import BLOCKS
from mbx.train.recipe.sections import Recipe


def check_blocks(recipe: Recipe, plan: Blueprint) -> None:
    """UsageError that names the products of a rank that `fp8.recipe` cannot cut into its blocks.

    Routers are not among them, whose products run in the model's precision or wider.
    """
    block = BLOCKS.get(recipe.fp8.recipe)
    if block is None:
        return
    shape, found = shape_of(plan.config), dict[str, str]()
    for layer in (*shape.layers, *shape.ahead):
        for one in sizes_of(recipe, shape, layer):
            rows = sum(one.atoms)
            if not one.module.endswith("router") and (rows % block or one.inputs % block):
                found.setdefault(one.module, f"`{one.module}` of layer {layer.index}: [{rows}, {one.inputs}]")
    if found:
        raise UsageError(
            f"fp8.recipe={recipe.fp8.recipe} needs multiples of {block} on both sides of each product of a rank; "
            f"not so: {', '.join(found)}",
            details=tuple(found.values()),
            hint="fewer ranks of tensor parallelism, or fp8.recipe=tensorwise",
        )
