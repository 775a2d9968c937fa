"""Which layer of a student hears which of its teacher, known before either is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import LayoutError, UnsupportedError, UsageError
from mbx.train.model.blueprint import Blueprint, as_int
from mbx.train.model.teacher import Teacher, of_teacher
from mbx.train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer of the student and one of the teacher, numbered from 1; what they hand on is compared.

    `chunk`: the model chunk that holds both, in order of depth. `widths`: of the student's states and the teacher's.
    """

    student: int
    teacher: int
    chunk: int
    widths: tuple[int, int]

    @property
    def projected(self) -> bool:
        """Whether a learned projection takes the student's states to the teacher's width."""
        return self.widths[0] != self.widths[1]

    @property
    def parameters(self) -> int:
        """Weights of the projection."""
        return self.widths[0] * self.widths[1] if self.projected else 0


def pairs_of(recipe: Recipe, plan: Blueprint, teacher: Teacher) -> tuple[Pair, ...]:
    """The pairs of a recipe, by the student's layers; none where no hidden states are learned.

    Without `distill.hidden_layers` every layer of the student hears the one as deep, counted from the last.
    UsageError for layers that are not there, LayoutError for two that lie on different stages of the pipeline.
    """
    if not recipe.distill.hidden_weight:
        return ()
    layers = [as_int(one.config, "num_layers") for one in (plan, teacher.plan)]
    widths = as_int(plan.config, "hidden_size"), as_int(teacher.plan.config, "hidden_size")
    chunks = [_chunks(plan, layers[0]), _chunks(teacher.plan, layers[1])]
    found = []
    for student, its in sorted(_asked(recipe.distill.hidden_layers, *layers).items()):
        for who, number, there in (("student", student, layers[0]), ("teacher", its, layers[1])):
            if not 1 <= number <= there:
                raise UsageError(f"distill.hidden_layers: the {who} has layers 1 to {there}, and no layer {number}")
        at, beside = chunks[0][student - 1], chunks[1][its - 1]
        if at != beside:
            raise LayoutError(
                f"distill.hidden_layers: the student's layer {student} is of stage {at + 1} of the pipeline, and the "
                f"teacher's layer {its} of stage {beside + 1}",
                hint="pair layers of one stage, leave distill.hidden_layers out, or parallel.pp=1",
            )
        found.append(Pair(student, its, at, widths))
    return tuple(found)


def _asked(given: Mapping[str, int], student: int, teacher: int) -> dict[int, int]:
    """The teacher's layer by the student's."""
    if not given:
        return {n: teacher - (student - n) * teacher // student for n in range(1, student + 1)}
    if odd := next((key for key in given if not (key.isascii() and key.isdigit() and str(int(key)) == key)), None):
        raise UsageError(
            f"distill.hidden_layers: {odd!r} is no number of a layer",
            hint="distill.hidden_layers.2=4 pairs the student's layer 2 with the teacher's layer 4",
        )
    return {int(key): value for key, value in given.items()}


def _chunks(plan: Blueprint, layers: int) -> list[int]:
    """The model chunk of each layer."""
    stages = plan.layout.stages(layers)
    return [number for number, stage in enumerate(stages) for _ in range(stage.layers)]


def check_hidden(recipe: Recipe, plan: Blueprint, teacher: Teacher | None) -> None:
    """Refuse hidden states that are not there, or cannot be compared; no `teacher`: its words are on disk."""
    if not recipe.distill.hidden_weight:
        return
    if teacher is None:
        raise UsageError(
            f"`{recipe.distill.teacher}` holds a teacher's likeliest tokens, and no hidden states",
            hint="distill.hidden_weight=0, or distill.teacher=DIR of a model that computes beside the student",
        )
    if recipe.parallel.cp > 1:
        raise UnsupportedError(
            "hidden states are not compared under context parallelism", hint="parallel.cp=1 or distill.hidden_weight=0"
        )
    _check_kind(plan)
    with of_teacher():
        _check_kind(teacher.plan)
    pairs_of(recipe, plan, teacher)


def _check_kind(plan: Blueprint) -> None:
    if plan.config.get("model.mcore_model") == "hybrid":
        raise UnsupportedError(
            "hidden states of hybrid models are not compared: Megatron Core counts their mixers and MLPs as layers",
            hint="distill.hidden_weight=0",
        )
