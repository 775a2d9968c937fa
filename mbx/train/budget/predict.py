"""Memory a rank will need, part by part, before anything runs.

A step is largest in one of a few phases (`activations.py`); the total is that of the largest, on top of what lasts:
weights, gradients, optimizer state. docs/training-figures.md holds the derivation and the
measured errors. Bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from converters.errors import UnsupportedError
from mbx.train.budget import teaching
from mbx.train.budget.activations import OUTPUT, in_flight, phases
from mbx.train.budget.adapters import chosen
from mbx.train.budget.counts import Counts, count
from mbx.train.budget.images import Looks
from mbx.train.budget.load import BYTES, WEIGHT_CAST, Load
from mbx.train.budget.shape import shape_of
from mbx.train.budget.teaching import TEACHER
from mbx.train.model.adapted import Linear
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.fp8 import holds_casts
from mbx.train.model.teacher import Teacher, teacher_of
from mbx.train.recipe.sections import Recipe

GIB = 1 << 30
#: CUDA context, NCCL and cuBLAS handles on an H200: outside PyTorch's allocator, inside the GPU's memory.
CONTEXT = 600 << 20
#: cuBLAS workspaces that PyTorch (32 MiB) and Transformer Engine (32 MiB + 1 KiB) allocate on Hopper.
WORKSPACES = 64 << 20
#: Transformer Engine runs the experts' products on four streams, each with a workspace of its own.
GROUPED_WORKSPACES = 128 << 20
#: The phase in which a tower works on a micro-batch's images.
TOWER = "the tower"
#: fp32 state a weight: Adam's two moments; one momentum buffer, which the fused SGD keeps even at momentum 0. Muon has
#: one a matrix, and Adam steps the rest.
_STATE = {"adam": 8, "sgd": 4, "muon": 8}


@dataclass(frozen=True, slots=True)
class Budget:
    """Predicted bytes of the rank that needs most, by part, in the `phase` that needs most."""

    parts: Mapping[str, int]
    counts: Counts
    stage: int
    phase: str

    @property
    def total(self) -> int:
        """Bytes PyTorch's allocator will hand out at the peak; compares with `max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def direction(self) -> str:
        """Of which pass the phase is: a frozen tower has no backward pass, and a teacher neither."""
        return "forward" if self.phase in (TOWER, TEACHER) else "backward"


def predict(recipe: Recipe, plan: Blueprint, dp: int, looks: Looks | None = None) -> Budget:
    """The budget of the pipeline stage that needs most; `looks`: of rows that show images."""
    return max(stages(recipe, plan, dp, looks), key=lambda budget: budget.total)


def stages(recipe: Recipe, plan: Blueprint, dp: int, looks: Looks | None = None) -> list[Budget]:
    """The budget of a rank of every pipeline stage."""
    known, teacher = chosen(recipe, plan), teacher_of(recipe)
    every = range(recipe.parallel.pp)
    return [_stage(recipe, plan, dp, stage, known, teacher, looks if stage == 0 else None) for stage in every]


def _stage(
    recipe: Recipe,
    plan: Blueprint,
    dp: int,
    stage: int,
    known: Mapping[str, Linear],
    teacher: Teacher | None,
    looks: Looks | None,
) -> Budget:
    c, p, t = count(recipe, plan, stage, known), recipe.parallel, recipe.train
    trained = c.adapters + c.whole if recipe.lora.rank else c.base
    learns = looks is not None and t.tower == "trained"
    trained += looks.parameters if looks is not None and learns else 0
    projections = teaching.projections(recipe, plan, teacher, stage)
    trained += projections
    shared = dp * p.cp if p.distributed_optimizer else 1
    experts = 0 if recipe.lora.rank else c.experts
    expert_shared = max(1, dp * p.cp * p.tp // (p.ep * p.etp)) if p.distributed_optimizer else 1
    state = _STATE[recipe.optim.optimizer] + (0 if t.precision == "fp32" else 4)  # the fp32 copy that is stepped
    s = shape_of(plan.config)
    load = Load(recipe, plan, s, t.micro_batch * recipe.data.length // p.cp, known)
    lasting = {
        "weights": (c.base + c.adapters + projections - (c.linears if holds_casts(recipe) else 0))
        * BYTES[t.precision],
        "gradients": trained * 4,
        "optimizer": math.ceil((trained - experts) * state / shared + experts * state / expert_shared)
        - (4 * c.matrices if recipe.optim.optimizer == "muon" else 0),
        "fp8 copies": _copies(recipe, c),
        "workspaces": WORKSPACES + (GROUPED_WORKSPACES if s.experts else 0),
        "tower": 0 if looks is None else looks.weights(recipe),
    }
    found = phases(load, stage, dp)
    if teacher is not None:
        lasting |= teaching.lasting(load, teacher, stage, dp)
        found[TEACHER] = teaching.speaking(load, teacher, stage, dp)
    if recipe.distill.teacher and OUTPUT in found:
        found[OUTPUT] = {**found[OUTPUT], **teaching.hearing(load, live=teacher is not None)}
    if looks is not None and learns:
        lasting["images"] = looks.working(recipe) * min(p.pp, t.global_batch // (t.micro_batch * dp))
    elif looks is not None:
        found[TOWER] = {"activations": in_flight(load, stage, dp), "images": looks.working(recipe)}
    phase = max(found, key=lambda name: sum(found[name].values()))
    parts = {**lasting, **found[phase]}
    return Budget({name: value for name, value in parts.items() if value}, c, stage, phase)


def _copies(recipe: Recipe, c: Counts) -> int:
    """FP8 and FP4 weights: the cast and its transpose, which backward passes read; frozen ones have no other form.

    Recomputed layers run first without gradients. Products with their norm in front cast for that pass alone, and by
    blocks that drops the transpose until their layer is computed again, behind the largest moment
    (transformer_engine/pytorch/module/layernorm_linear.py against linear.py, 2.11).
    """
    if recipe.fp8.recipe == "none":
        return 0
    dropped = recipe.fp8.recipe in ("blockwise", "mxfp8", "nvfp4") and recipe.train.recompute == "full"
    casts = 2 * c.linears - (c.normed if dropped and not holds_casts(recipe) else 0)
    return round(casts * WEIGHT_CAST[recipe.fp8.recipe])


def suggestions(recipe: Recipe, plan: Blueprint, dp: int, looks: Looks | None = None) -> list[tuple[str, int]]:
    """Single changes that would lower the peak by 0.01 GiB or more, with the bytes each saves, most first."""
    here, p, t = predict(recipe, plan, dp, looks).total, recipe.parallel, recipe.train
    groups = {layer.heads.groups for layer in shape_of(plan.config).layers}
    options: list[tuple[str, str, str | int, bool]] = [
        ("train", "recompute", "full", t.recompute != "full"),
        ("train", "micro_batch", t.micro_batch // 2, t.micro_batch > 1),
        ("lora", "rank", 16, not recipe.lora.rank),
        ("fp8", "recipe", "none", recipe.fp8.recipe != "none"),
        ("distill", "top_k", 64, bool(recipe.distill.teacher) and not recipe.distill.top_k),
        ("parallel", "tp", 2 * p.tp, all(n % (2 * p.tp) == 0 for n in groups)),
    ]
    found = []
    for section, key, value, possible in options:
        if not possible:
            continue
        changed = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
        layout = replace(plan.layout, tp=changed.parallel.tp)
        try:
            saved = here - predict(changed, replace(plan, layout=layout), dp, looks).total
        except UnsupportedError:
            continue
        found.append((f"{section}.{key}={value}", saved))
    return sorted((tip for tip in found if tip[1] >= GIB / 100), key=lambda item: -item[1])


def lines(budget: Budget, tips: list[tuple[str, int]]) -> list[str]:
    """The budget as a table, in GiB."""
    width = max(len(name) for name in budget.parts)
    rows = [f"{name:<{width}}  {value / GIB:8.2f} GiB" for name, value in budget.parts.items()]
    rows.append(
        f"{'total':<{width}}  {budget.total / GIB:8.2f} GiB  in the {budget.direction} pass of {budget.phase}"
        f" (on a GPU about {CONTEXT / GIB:.1f} GiB of CUDA context more)"
    )
    rows += [f"{name} would save {saved / GIB:.2f} GiB" for name, saved in tips]
    return rows
