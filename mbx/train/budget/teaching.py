"""What a teacher adds to the memory of a student's rank, in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mbx.train.budget.activations import chunks_in_flight, in_flight, kept
from mbx.train.budget.counts import count, layers_of
from mbx.train.budget.load import BYTES, Load
from mbx.train.budget.shape import shape_of
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.hidden import Pair, pairs_of
from mbx.train.model.teacher import LOSS_CHUNK, Teacher
from mbx.train.recipe.sections import Recipe

#: The phase in which the teacher's layers work on a micro-batch.
TEACHER = "the teacher"
#: fp32 chunks of logits that lie side by side: both sides', as they are and over the temperature, and the gradient.
_CHUNKS = 5


def projections(recipe: Recipe, plan: Blueprint, teacher: Teacher | None, stage: int) -> int:
    """Weights by which a stage's hidden states are compared with the teacher's, trained with the student's own."""
    return 0 if teacher is None else sum(pair.parameters for pair in _pairs(recipe, plan, teacher, stage))


def _pairs(recipe: Recipe, plan: Blueprint, teacher: Teacher, stage: int) -> Sequence[Pair]:
    """The pairs of layers of a pipeline rank, in all its chunks."""
    return [pair for pair in pairs_of(recipe, plan, teacher) if pair.chunk % recipe.parallel.pp == stage]


def lasting(load: Load, teacher: Teacher, stage: int, dp: int) -> Mapping[str, int]:
    """Its weights, in the run's precision, the states that it handed to micro-batches under way, and the gradients of
    hidden states, which wait for their micro-batch to come back."""
    weights = count(teacher.recipe, teacher.plan, stage).base * BYTES[load.recipe.train.precision]
    states = load.tokens * load.shape.hidden * load.b // load.cut
    states += load.tokens * shape_of(teacher.plan.config).hidden * load.b // load.cut
    under_way = chunks_in_flight(load, stage, dp)
    behind = load.recipe.parallel.pp > 1 and stage > 0
    compared = len(_pairs(load.recipe, load.plan, teacher, stage)) * _handed_on(load, teacher)
    return {
        "teacher": weights,
        "teacher's states": round(states * under_way) if behind else 0,
        "hidden states": round(compared * under_way),
    }


def _handed_on(load: Load, teacher: Teacher) -> int:
    """What a layer of the teacher hands on."""
    return load.tokens * shape_of(teacher.plan.config).hidden * load.b // load.cut


def hearing(load: Load, *, live: bool) -> Mapping[str, int]:
    """What the output layer's phase has beside the student's logits: those of a teacher that is `live`, unless a few
    tokens are all that is heard and its logits are gone by then, and rows in fp32."""
    columns = load.plan.padded_vocab // load.recipe.parallel.tp
    whole = live and not load.recipe.distill.top_k
    return {
        "teacher's logits": load.tokens * columns * load.b if whole else 0,
        "fp32 rows": _CHUNKS * 4 * min(load.tokens * columns, LOSS_CHUNK),
    }


def speaking(load: Load, teacher: Teacher, stage: int, dp: int) -> Mapping[str, int]:
    """The teacher's own pass: what a layer of it needs at most, its logits, and what the student's layers have yet to
    hear; other micro-batches wait meanwhile."""
    p, its = load.recipe.parallel, shape_of(teacher.plan.config)
    own = Load(teacher.recipe, teacher.plan, its, load.tokens)
    layer = max(kept(own, layer) for layer in layers_of(its, p.pp, stage))
    columns = load.plan.padded_vocab // p.tp if stage == p.pp - 1 else 0
    heard = {(pair.chunk, pair.teacher) for pair in _pairs(load.recipe, load.plan, teacher, stage)}
    return {
        "activations": in_flight(load, stage, dp),
        "teacher's layer": layer + 2 * load.tokens * its.hidden * load.b,
        "teacher's logits": load.tokens * columns * load.b,
        "teacher's hidden states": len(heard) // p.vpp * _handed_on(load, teacher),
    }
