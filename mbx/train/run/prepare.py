"""Checks a recipe against this machine, its model and its data, before a process group or a GPU is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from converters.errors import DeviceError, MbxError, StorageError, UnsupportedError, UsageError
from mbx.formats import hf
from mbx.formats.adapter_folder import is_adapter
from mbx.train.budget.blocks import check_blocks
from mbx.train.budget.images import Looks, looks_of
from mbx.train.checkpoints.beside import check_predictions, check_random, check_tower, said_of
from mbx.train.checkpoints.state import (
    check_continues,
    check_same_rows,
    check_vocabulary,
    read_recipe,
    read_state,
)
from mbx.train.data.examples import resolved
from mbx.train.data.rows import Rows
from mbx.train.distill.stored import Logits
from mbx.train.lora.attach import check_lora, check_resumed
from mbx.train.lora.peft_folder import check_adapter, like_adapter, open_for
from mbx.train.model.adapted import adapted, unloaded
from mbx.train.model.blueprint import Blueprint, blueprint
from mbx.train.model.fp8 import check_fp8
from mbx.train.model.hidden import check_hidden
from mbx.train.model.kernels import check_kernels, unpacked_layers
from mbx.train.model.muon import check_muon
from mbx.train.model.parallel import Ranks, planned_ranks
from mbx.train.model.sight import RECORDED, check_images, learns
from mbx.train.model.teacher import Teacher, check_student, check_teacher, logits_of, of_teacher, teacher_of
from mbx.train.model.weights import check_source
from mbx.train.recipe.sections import LORA, Lora, Recipe
from mbx.train.run.dataset import Dataset, read_data, with_steps
from mbx.train.run.first_weights import Start, continued_at, decide
from mbx.train.run.hooks import NO_HOOKS, Hooks
from mbx.train.run.layers import check_axes, check_local
from mbx.train.run.log import check_writers
from mbx.train.run.rewind import check_rewind
from mbx.train.run.stragglers import check_stragglers

#: Hints of the conversion, in a recipe's words.
_KEYS = {
    "‹mapping› FILE": "model.mapping=FILE",
    "with ‹allow-unused-key› NAME": "with model.allow_unused_key=NAME",
}
#: Rows that a teacher's words are looked up for ahead of a run, which takes a second.
_LOOKED_AT = 1000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked recipe: everything that can be wrong has been looked at, and no GPU has been touched."""

    recipe: Recipe
    start: Start
    ranks: Ranks
    plan: Blueprint
    data: Dataset
    teacher: Teacher | None = None
    logits: Logits | None = None
    hooks: Hooks = NO_HOOKS

    @property
    def train_rows(self) -> Rows | None:
        """Rows to train on; None where Megatron Core's datasets give them."""
        return self.data.train

    @property
    def looks(self) -> Looks | None:
        """What images add to the memory of the first stage; None without."""
        counts, eyes = self.data.counts, self.data.eyes
        return None if counts is None or eyes is None else looks_of(eyes.sight, counts.row_picture_tokens)

    @property
    def eval_rows(self) -> Rows | None:
        """Rows to validate on."""
        return self.data.evaluation


def prepare(
    recipe: Recipe,
    init_from: str | None = None,
    resume: bool = False,
    *,
    anew: bool = False,
    hooks: Hooks = NO_HOOKS,
    dry: bool = False,
) -> Prepared:
    """Check a recipe against this machine, its model and its data; MbxError says what is wrong.

    `anew`: begin, or resume where the same run has a checkpoint already. `hooks`: functions of the user's own; where
    they say what is learned, passes are not recorded. `dry`: nothing will be trained, so the processes, the GPU and
    the weights need not be there.
    """
    if anew and continued_at(recipe.run_dir):
        init_from, resume = None, True
    if recipe.lora.rank:
        hooks.method(recipe.lora.method)
    if hooks.token_losses is not None or recipe.lora.method != LORA:
        recipe = replace(recipe, train=replace(recipe.train, cuda_graph="off"))
    try:
        return replace(_prepare(recipe, init_from, resume, anew, dry), hooks=hooks)
    except MbxError as error:
        for option, key in _KEYS.items():
            error.hint = error.hint and error.hint.replace(option, key)
        raise


def _prepare(recipe: Recipe, init_from: str | None, resume: bool, anew: bool, dry: bool) -> Prepared:
    if recipe.data.path:
        recipe = replace(recipe, data=resolved(recipe.data))
    if init_from and recipe.lora.rank and is_adapter(init_from) and not resume:
        recipe, init_from = replace(recipe, lora=replace(recipe.lora, adapter=init_from)), None
    start = decide(recipe, init_from, resume, anew)
    # before the ranks: a size that does not divide the model is no matter of processes
    plan = blueprint(recipe)
    ranks = planned_ranks(recipe, dry=dry)
    if recipe.data.packs and (layers := unpacked_layers(plan.config, te=ranks.te)):
        recipe = replace(recipe, data=replace(recipe.data, pack=False))
        start = replace(start, why=f"{start.why}; one example a row (data.pack=false): {layers} keep nothing apart")
    resumed = start.path if start.how == "resume" else None
    if resumed:
        recipe = replace(recipe, lora=continued(recipe.lora, read_recipe(resumed).lora))
        check_continues(recipe, resumed)
        check_vocabulary(resumed, plan.padded_vocab, recipe.parallel.tp)
        check_predictions(blueprint(read_recipe(resumed)), plan)
        check_resumed(recipe.lora, plan, resumed)
    if plan.table is not None and plan.table.unsupported:
        raise UnsupportedError(
            f"another model would be trained: {plan.table.unsupported}",
            hint="conversions of this family carry its weights; no training does",
        )
    check_fp8(recipe, ranks)
    check_blocks(recipe, plan)
    check_muon(recipe, plan, ranks.dp * recipe.parallel.cp, dry=dry)
    check_writers(recipe)
    check_rewind(recipe)
    check_stragglers(recipe, dry)
    check_axes(recipe, plan, ranks, dry)
    if not ranks.te and not dry:
        check_local(plan.config, adapters=recipe.lora.rank > 0, tp=recipe.parallel.tp)
    if not dry:
        check_kernels(plan.config)
    teacher = _teacher(recipe, plan, ranks, dry)
    check_hidden(recipe, plan, teacher)
    if plan.config.get("gradient_accumulation_fusion") and not find_spec("fused_weight_gradient_mlp_cuda"):
        raise DeviceError(
            "gradient_accumulation_fusion=true needs Apex, which is not installed",
            hint="model.config.gradient_accumulation_fusion=false",
        )
    if recipe.lora.rank:
        check_lora(recipe, plan)
        if recipe.lora.adapter and not resumed:
            recipe = replace(recipe, lora=_begun(recipe.lora, plan))
            check_lora(recipe, plan)
    if (source := start.path) and start.how == "init":
        if dry and source == plan.hf and not hf.has_weights(source):  # a config is enough for a plan
            start = replace(start, why=f"{start.why}, which are not there yet")
        else:
            check_source(plan, source)
    data = read_data(recipe, plan)
    asked = recipe.data
    recipe, why = _with_images(recipe, plan, ranks, data)
    if data.eyes is not None and data.eyes.sight.turned:  # the fused kernel turns all rows of a micro-batch alike
        plan = replace(plan, config={**plan.config, "apply_rope_fusion": False})
    data = read_data(recipe, plan) if recipe.data != asked else data
    start = replace(start, why=start.why + why + _word_on_adapters(recipe.lora, plan))
    if resumed:
        check_same_rows(resumed, data.identity)
    start = _with_beside(recipe, plan, start, data)
    recipe = with_steps(recipe, data)
    logits = _logits(recipe, plan, data)
    return Prepared(recipe, start, ranks, plan, data, teacher, logits)


def _word_on_adapters(lora: Lora, plan: Blueprint) -> str:
    """What a run says of adapters that PEFT will not load."""
    word = unloaded(adapted(lora, plan)) if lora.rank else ""
    return f"; {word}" if word else ""


def _with_beside(recipe: Recipe, plan: Blueprint, start: Start, data: Dataset) -> Start:
    """The start, and what it says of prediction layers that are left out: the checkpoints of a run carry them.

    What lies beside the model where it starts has to be what the run has beside it.
    """
    if data.eyes is not None and start.how == "init" and start.path:
        check_tower(plan, start.path)
    if start.how == "random" and (recipe.run.save or recipe.run.export_every):
        check_random(plan)
    if not recipe.run.save or recipe.lora.rank:
        return start
    resumed = start.path if start.how == "resume" else None
    base = read_state(resumed).base if resumed else str(start.path or "")
    left = said_of(plan, base, resumed)
    return replace(start, why=f"{start.why}; {left}") if left else start


def _logits(recipe: Recipe, plan: Blueprint, data: Dataset) -> Logits | None:
    """What a teacher said before, checked against the recipe; None without."""
    if (folder := logits_of(recipe)) is None:
        return None
    check_student(plan)
    logits = Logits(folder)
    logits.check(recipe, plan)
    if data.train is not None:  # other data is told before anything is built
        rows, t = logits.beside(data.train), recipe.train
        for number in range(min(t.steps * t.global_batch, _LOOKED_AT)):
            rows.row(number)
        rows.check()
    return logits


def _teacher(recipe: Recipe, plan: Blueprint, ranks: Ranks, dry: bool) -> Teacher | None:
    """The teacher, checked as the student is; None without one."""
    teacher = teacher_of(recipe)
    if teacher is None:
        return None
    with of_teacher():
        if recipe.data.packs and (layers := unpacked_layers(teacher.plan.config, te=ranks.te)):
            raise UsageError(f"{layers} keep no packed examples apart", hint="data.pack=false")
        check_axes(teacher.recipe, teacher.plan, ranks, dry)
        if not dry:
            check_kernels(teacher.plan.config)
            if not ranks.te:
                check_local(teacher.plan.config, adapters=True, tp=recipe.parallel.tp)
    check_teacher(recipe, plan, teacher, dry=dry)
    return teacher


def _with_images(recipe: Recipe, plan: Blueprint, ranks: Ranks, data: Dataset) -> tuple[Recipe, str]:
    """The recipe as the images of the data are trained with it, and what the run says of a change of its rows."""
    if data.eyes is None:
        if learns(recipe):
            raise UsageError(
                "no row shows an image, so nothing would reach the tower that is to learn",
                hint="train.tower=frozen, without lora.tower_targets",
            )
        return recipe, ""
    if recipe.distill.teacher:
        raise UnsupportedError("a teacher reads text alone, and rows show images", hint="leave out distill.teacher")
    check_images(recipe, plan, ranks, data.eyes.sight)
    said = ""
    if (kind := data.eyes.sight.kind) not in RECORDED and ranks.te and recipe.train.cuda_graph != "off":
        recipe = replace(recipe, train=replace(recipe.train, cuda_graph="off"))
        said = f"; passes are launched: no GPU has compared recorded ones that show images to {kind}"
    if learns(recipe):  # which a micro-batch without images would not reach
        recipe = replace(recipe, parallel=replace(recipe.parallel, overlap_grad_reduce=False))
    if not (recipe.data.packs and ranks.te):  # whose packed rows turn by a count of their own
        return recipe, said
    recipe = replace(recipe, data=replace(recipe.data, pack=False))
    return recipe, said + "; one chat a row (data.pack=false): Transformer Engine packs no rows that show images"


def _begun(lora: Lora, plan: Blueprint) -> Lora:
    """Adapters that begin with another's values, and are like it."""
    if not Path(lora.adapter).is_dir():
        raise StorageError(f"lora.adapter: `{lora.adapter}` is no folder")
    adapter = open_for(plan, Path(lora.adapter))
    lora = like_adapter(lora, adapter)
    check_adapter(lora, plan, adapter)
    return lora


def continued(lora: Lora, before: Lora) -> Lora:
    """A resumed run's adapters: what the run itself took from the adapter that it began with is not asked again."""
    if not before.adapter or lora.adapter not in ("", before.adapter):
        return lora
    return replace(
        lora,
        adapter=before.adapter,
        rslora=before.rslora,
        modules_to_save=lora.modules_to_save or before.modules_to_save,
        rank_pattern=lora.rank_pattern or before.rank_pattern,
        alpha_pattern=lora.alpha_pattern or before.alpha_pattern,
    )
