"""Whether a recipe fits a GPU, what changing it would buy, and the fastest settings that fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from converters.errors import LayoutError, UnsupportedError, UsageError
from mbx.train.budget.blocks import check_blocks
from mbx.train.budget.devices import Device
from mbx.train.budget.host import host_memory, page_cache, total
from mbx.train.budget.predict import CONTEXT, Budget, predict
from mbx.train.budget.speed import tokens_per_s
from mbx.train.model.blueprint import Blueprint, blueprint
from mbx.train.model.fp8 import check_capability, runs_on
from mbx.train.recipe.sections import Recipe
from mbx.train.recipe.world import check_world, smallest_world

#: What a prediction may be off, and what fragments take of the allocator's memory.
MARGIN = 0.05
#: What says of a setting that this model or this many GPUs do not take it.
_NOT_TAKEN = (LayoutError, UnsupportedError, UsageError)
Verdict: TypeAlias = Literal["yes", "barely", "no"]


@dataclass(frozen=True, slots=True)
class Fit:
    """A recipe on a GPU: its budget, all bytes that are needed there, and whether they are there.

    `yes`: with 5 % to spare for an error of the prediction; `barely`: without; on unified memory the processor's part
    is needed as well, and for `yes` the page cache that the weights pass through.
    """

    changes: tuple[str, ...]
    recipe: Recipe
    budget: Budget
    needed: int
    verdict: Verdict
    tokens_per_s: float


def fit(recipe: Recipe, plan: Blueprint, device: Device, dp: int, changes: Sequence[str] = ()) -> Fit:
    """What a recipe needs of `device` and whether it is there.

    DeviceError for FP8 or FP4 that it has not, UsageError for products that these do not divide.
    """
    if recipe.fp8.recipe != "none" and device.capability is not None:
        check_capability(recipe.fp8.recipe, device.capability)
    check_blocks(recipe, plan)
    budget = predict(recipe, plan, dp)
    needed, cache = budget.total + CONTEXT, 0
    if device.unified:
        needed += total(host_memory(recipe, budget))
        cache = page_cache(recipe, budget)
    spare = round(budget.total * MARGIN)
    verdict: Verdict = (
        "yes" if needed + spare + cache <= device.memory else "barely" if needed <= device.memory else "no"
    )
    speed = tokens_per_s(recipe, plan, device, dp) if device.tflops else 0.0
    return Fit(tuple(changes), recipe, budget, needed, verdict, speed)


def variants(recipe: Recipe, device: Device, world_size: int) -> list[Fit]:
    """The recipe with one thing changed, each that needs 1 % less or better, most first; layouts take more GPUs."""
    p, t = recipe.parallel, recipe.train
    single = [
        ["train.recompute=selective"] if t.recompute == "none" else [],
        ["train.recompute=full"] if t.recompute != "full" else [],
        [f"train.micro_batch={t.micro_batch // 2}"] if t.micro_batch > 1 else [],
        [f"data.length={recipe.data.length // 2}"],
        ["lora.rank=16"] if not recipe.lora.rank else [],
        ["fp8.recipe=none"] if recipe.fp8.recipe != "none" else [],
        ["optim.optimizer=sgd"] if recipe.optim.optimizer == "adam" and not recipe.lora.rank else [],
        *([f"parallel.{axis}={2 * getattr(p, axis)}"] for axis in ("tp", "pp", "ep", "cp")),
    ]
    here = fit(recipe, blueprint(recipe), device, check_world(recipe, world_size)).needed
    found = [one for changes in single if changes and (one := _changed(recipe, changes, device, world_size))]
    return sorted((one for one in found if one.needed < 0.99 * here), key=lambda one: one.needed)


def _changed(recipe: Recipe, changes: Sequence[str], device: Device, world_size: int) -> Fit | None:
    """The recipe with `changes`, in as many processes as it then needs; None where the model does not take them."""
    changed = _apply(recipe, changes)
    try:
        need = smallest_world(changed)
        world = -(-world_size // need) * need
        return fit(changed, blueprint(changed), device, check_world(changed, world), changes)
    except _NOT_TAKEN:
        return None


def _apply(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    for change in changes:
        key, _, text = change.partition("=")
        section, _, name = key.partition(".")
        old = getattr(recipe, section)
        value: str | int = int(text) if text.isdigit() else text
        recipe = replace(recipe, **{section: replace(old, **{name: value})})
    return recipe


def search(recipe: Recipe, device: Device, world_size: int) -> list[Fit]:
    """Settings that fit `world_size` GPUs of this kind, the fastest by the estimate first.

    Micro-batch, recomputation, tensor parallelism and FP8 are searched; the global batch and the rest stay.
    """
    if not device.tflops:
        raise UsageError("nothing is known of the speed of a GPU given by its memory", hint="name it, such as h100")
    found = []
    for changes in _settings(recipe, device, world_size):
        changed = _apply(recipe, changes)
        try:
            plan = blueprint(changed)
            one = fit(changed, plan, device, check_world(changed, world_size), changes)
        except _NOT_TAKEN:
            continue
        if one.verdict == "yes":
            found.append(one)
    return sorted(found, key=lambda one: (-one.tokens_per_s, one.needed))


def _settings(recipe: Recipe, device: Device, world_size: int) -> Iterator[tuple[str, ...]]:
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= world_size]
    batches = [n for n in (1, 2, 4, 8, 16, 32) if n <= recipe.train.global_batch]
    recomputes = ("none", "selective", "full")
    for tp, batch, again, cast in itertools.product(sizes, batches, recomputes, ("none", *casts(device, recipe))):
        yield (
            f"parallel.tp={tp}",
            f"train.micro_batch={batch}",
            f"train.recompute={again}",
            f"fp8.recipe={cast}",
        )


def casts(device: Device, recipe: Recipe) -> list[str]:
    """FP8 recipes that a GPU and a recipe take."""
    return [name for name in ("tensorwise", "blockwise", "mxfp8") if _runs(name, device, recipe)]


def _runs(name: str, device: Device, recipe: Recipe) -> bool:
    if device.capability is None or recipe.train.precision != "bf16" or recipe.lora.dora:
        return False
    return runs_on(name, device.capability)
