"""Checks a recipe against this machine, its model and its data, before a process group or a GPU is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from converters.errors import DeviceError, MbxError, StorageError, UnsupportedError, UsageError
from converters.rows.expr import Value
from mbx.formats import hf
from mbx.formats.torch_dist import TRACKER
from mbx.train.checkpoints.state import check_continues, check_world, finished, latest
from mbx.train.data.examples import read_examples
from mbx.train.data.rows import Pattern, Rows, check_indexed, example_rows
from mbx.train.lora.attach import check_lora
from mbx.train.model.blueprint import Blueprint, blueprint, load_tokenizer
from mbx.train.model.config import sequence_parallel
from mbx.train.model.fp8 import check_fp8
from mbx.train.model.parallel import Ranks, planned_ranks
from mbx.train.model.weights import check_source
from mbx.train.recipe.sections import Recipe
from mbx.train.run.log import check_writers

#: Hints of the conversion, in a recipe's words.
_KEYS = {
    "‹mapping› FILE": "model.mapping=FILE",
    "with ‹allow-unused-key› NAME": "by a table of your own, model.mapping=FILE",
}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: `how` is `init` (weights from `path`), `random`, or `resume` (everything from `path`)."""

    how: str
    path: Path | None
    why: str


def decide(recipe: Recipe, init_from: str | None, resume: bool) -> Start:
    """Where this run starts, and why; UsageError or StorageError where that is not possible or not clear."""
    run, found = recipe.run_dir, latest(recipe.run_dir)
    used = run.is_dir() and any(run.iterdir())
    again = "it holds no checkpoint: remove it, or run.dir=NAME starts another"
    if not found and (lost := finished(run)):
        number = int(lost[-1].name.removeprefix("iter_"))
        again = f"its tracker is gone: echo {number} > {run / TRACKER} makes ‹resume› continue from {lost[-1].name}"
    if init_from and resume:
        raise UsageError("‹init-from› starts a new run and ‹resume› continues one: give one of them")
    if resume:
        if found is None:
            hint = again if used else "leave ‹resume› out to start the run"
            raise StorageError(f"‹resume›: `{run}` has no checkpoint that its tracker names", hint=hint)
        return Start("resume", found, f"resuming {run} at {found.name}")
    if used:
        hint = "‹resume› continues it; run.dir=NAME starts another" if found else again
        raise UsageError(f"the run folder `{run}` is not empty", hint=hint)
    if init_from:
        if not Path(init_from).is_dir():
            what = "is no folder" if Path(init_from).exists() else "does not exist"
            raise StorageError(f"‹init-from›: `{init_from}` {what}")
        return Start("init", Path(init_from), f"new run in {run}, weights from {init_from}")
    if recipe.model.init == "random":
        if recipe.lora.rank and recipe.run.save:
            raise UsageError(
                "adapters on random weights cannot be resumed or merged: no checkpoint holds their base",
                hint="model.init=pretrained, or ‹init-from› DIR; run.save=false trains without checkpoints",
            )
        return Start("random", None, f"new run in {run}, random weights (seed {recipe.train.seed})")
    if not recipe.model.path:
        raise UsageError(
            f"recipe `{recipe.name}` trains pretrained weights, and no model is named",
            hint="model=DIR names a Hugging Face folder; model.init=random draws new weights",
        )
    return Start("init", Path(recipe.model.path), f"new run in {run}, weights from {recipe.model.path}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked recipe: everything that can be wrong has been looked at, and no GPU has been touched."""

    recipe: Recipe
    start: Start
    ranks: Ranks
    plan: Blueprint
    train_rows: Rows | None
    eval_rows: Rows | None


def prepare(recipe: Recipe, init_from: str | None = None, resume: bool = False, *, dry: bool = False) -> Prepared:
    """Check a recipe against this machine, its model and its data; MbxError says what is wrong.

    `dry`: nothing will be trained, so the processes, the GPU and the weights need not be there.
    """
    try:
        return _prepare(recipe, init_from, resume, dry)
    except MbxError as error:
        for option, key in _KEYS.items():
            error.hint = error.hint and error.hint.replace(option, key)
        raise


def _prepare(recipe: Recipe, init_from: str | None, resume: bool, dry: bool) -> Prepared:
    start = decide(recipe, init_from, resume)
    if start.path and start.how == "resume":
        check_continues(recipe, start.path)
    # before the ranks: a size that does not divide the model is no matter of processes
    plan = blueprint(recipe)
    if plan.table is not None and plan.table.unsupported:
        raise UnsupportedError(
            f"another model would be trained: {plan.table.unsupported}",
            hint="conversions of this family carry its weights; no training does",
        )
    ranks = planned_ranks(recipe, dry=dry)
    check_fp8(recipe, ranks)
    check_writers(recipe)
    if start.path and start.how == "resume" and not dry:
        check_world(start.path, ranks.world_size)
    _check_axes(recipe, plan, ranks, dry)
    if not ranks.te and not dry:
        _check_local(plan.config, adapters=recipe.lora.rank > 0)
    if plan.config.get("gradient_accumulation_fusion") and not find_spec("fused_weight_gradient_mlp_cuda"):
        raise DeviceError(
            "gradient_accumulation_fusion=true needs Apex, which is not installed",
            hint="model.config.gradient_accumulation_fusion=false",
        )
    if recipe.lora.rank:
        check_lora(recipe, plan)
    if (source := start.path) and start.how == "init":
        if dry and source == plan.hf and not hf.has_weights(source):  # a config is enough for a plan
            start = replace(start, why=f"{start.why}, which are not there yet")
        else:
            check_source(plan, source)
    train_rows, eval_rows = _read_rows(recipe, plan)
    return Prepared(recipe, start, ranks, plan, train_rows, eval_rows)


def _check_axes(recipe: Recipe, plan: Blueprint, ranks: Ranks, dry: bool) -> None:
    """Refuse axes that these rows, this device or this model have no kernels for."""
    if recipe.parallel.cp > 1 and recipe.data.packs:
        raise UsageError("packed rows cannot be cut by context parallelism", hint="data.pack=false or parallel.cp=1")
    if recipe.parallel.cp > 1 and not ranks.te:
        raise DeviceError(
            f"parallel.cp={recipe.parallel.cp} needs the attention of Transformer Engine, on a GPU",
            hint="parallel.cp=1",
        )
    shared = recipe.parallel.sequence_parallel if dry else sequence_parallel(recipe, ranks)
    if plan.config.get("num_moe_experts") and recipe.parallel.tp > 1 and not shared:
        raise DeviceError(
            f"parallel.tp={recipe.parallel.tp}: Megatron Core trains experts under tensor parallelism with sequence "
            "parallelism only, which needs GPUs and parallel.sequence_parallel=true",
            hint="parallel.tp=1; parallel.ep shares the experts out",
        )


def _check_local(config: Mapping[str, Value], *, adapters: bool) -> None:
    """Refuse models that Megatron Core's own layers do not train."""
    # Their MLP adds a bias in place to a view, which autograd forbids where the view has a gradient to give.
    biased_experts = config.get("num_moe_experts") and config.get("add_bias_linear", True) and not adapters
    kinds = {
        "hybrid (Mamba) models": config.get("model.mcore_model") == "hybrid",
        f"{config.get('experimental_attention_variant')} layers": config.get("experimental_attention_variant"),
        "all weights of experts that have biases": biased_experts,
    }
    if found := next((kind for kind, there in kinds.items() if there), None):
        raise UnsupportedError(
            f"Megatron Core trains {found} with Transformer Engine only",
            hint="on a GPU: pip install transformer-engine",
        )


def _read_rows(recipe: Recipe, plan: Blueprint) -> tuple[Rows | None, Rows | None]:
    """Train and validation rows; those of Megatron Core's datasets need the process group and come later."""
    d = recipe.data
    if d.kind == "pattern":
        return Pattern(plan.vocab, d.length, d.seed), Pattern(plan.vocab, d.length, d.seed + 1)
    if d.kind == "mock":
        return None, None
    if not d.path:
        name = "PREFIX, the files' path without .bin and .idx" if d.kind == "indexed" else "FILE.jsonl"
        raise UsageError(f"data.kind `{d.kind}` needs a file", hint=f"data={name}")
    if d.kind == "indexed":
        check_indexed(d)
        return None, None
    tokenizer = load_tokenizer(plan)
    if d.kind == "chat" and not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer of `{plan.hf}` has no chat template", hint="data.kind=completion or text needs none"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def rows(path: str) -> Rows:
        return example_rows(d, read_examples(d, Path(path), tokenizer), int(pad or 0))

    return rows(d.path), rows(d.eval_path) if d.eval_path else None
