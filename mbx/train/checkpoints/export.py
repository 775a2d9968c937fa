"""A finished run as a Hugging Face folder or a PEFT adapter; no model is built."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.megatron import TOWER
from converters.errors import UsageError
from converters.rows.coverage import Waivers
from mbx.formats import hf
from mbx.formats.adapter_folder import open_base, trained
from mbx.run.adapters import plan_adapter_to_hf
from mbx.run.job import Options, plan_mcore_to_hf, run
from mbx.run.merge import plan_merge
from mbx.train.checkpoints.beside import beside_of
from mbx.train.checkpoints.best import read_best
from mbx.train.checkpoints.own_method import export_tuned
from mbx.train.checkpoints.state import finished, latest, read_recipe, read_state
from mbx.train.data.templates import TEMPLATE_FILE
from mbx.train.lora.method import Tuned
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.fp8 import holds_casts
from mbx.train.recipe.sections import LORA, Recipe
from mbx.untrusted.names import writable

if TYPE_CHECKING:
    from torch import nn


def export_run(
    run_dir: Path, target: Path, *, merged: bool = False, best: bool = False, method: type[Tuned] | None = None
) -> tuple[Path, str]:
    """Write what a run trained, and say what it is: a model, a PEFT adapter, or (`merged`) the base with it.

    The last checkpoint, or the one with the `best` validation loss. `method`: of the user's own, that trained it.

    Weights keep their dtype, but for norms that Megatron Core stores as gamma and the folder as 1 + gamma (gated delta
    nets): those trained in 16 bits, which have no room for the sum, are written in fp32; rounding moves logits by
    tenths. An adapter is merged in fp32.
    """
    found = _best(run_dir) if best else latest(run_dir)
    if found is None:
        raise UsageError(f"`{run_dir}` holds no checkpoint to export")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"`{target}` is not empty", hint="name a new folder")
    recipe = read_recipe(found)
    lora, mapping, keys = recipe.lora, recipe.model.mapping or None, recipe.model.waived_keys
    # a trained tower's tensors are in hf/ as well, under the folder's names
    own = Waivers(unused=(f"{TOWER}*",)) if recipe.train.tower == "trained" else Waivers()
    options = Options(mapping=mapping, allow_unused_keys=keys, waivers=own)
    adapters = lora.rank > 0
    base = Path(read_state(found).base) if adapters and merged else None
    if base is not None and not (base / hf.CONFIG).is_file():
        raise UsageError(
            f"the adapters' base `{base}` is no Hugging Face folder to merge into",
            hint="export the adapter without ‹merged›, or convert the base first",
        )
    if not (found / "hf" / hf.CONFIG).is_file():
        raise UsageError(
            f"`{found}` was trained without a Hugging Face folder, whose names an export needs",
            hint=None if adapters else "mbx convert mcore-to-hf ‹hf-config› DIR",
        )
    if lora.method != LORA:
        if merged or method is None:
            why = "‹merged› adds factors of rank N" if merged else "‹hooks› FILE has what writes it"
            raise UsageError(f"the run was trained by the method `{lora.method}`", hint=why)
        return export_tuned(found, recipe, method, target), f"PEFT adapter ({lora.method})"
    if not adapters:
        job, kind = plan_mcore_to_hf(found, target, replace(options, exact_norms=True)), "Hugging Face model"
    elif base is not None and (lora.modules_to_save or lora.tower_targets):
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            opened = open_base(base, mapping, keys)
            peft = run(plan_adapter_to_hf(found, Path(work) / "adapter", options, opened)).target
            merged_kind = "Hugging Face model, adapter merged in fp32"
            return run(plan_merge(base, peft, target, options)).target, merged_kind
    elif base is not None:
        job, kind = plan_merge(base, found, target, options), "Hugging Face model, adapter merged in fp32"
    else:
        opened = open_base(found / "hf", mapping, keys)
        job, kind = plan_adapter_to_hf(found, target, options, opened), "PEFT adapter"
    return run(job).target, kind


def export_beside(
    recipe: Recipe, plan: Blueprint, chunks: Sequence[nn.Module], step: int, *, base: str, template: str
) -> str:
    """Write what a running model is to `export/` of its run, where it is not there yet; a line to log. Collective.

    `base` is where the run's first weights were read, `template` the chat template that was trained with, if named.
    """
    import torch

    from mbx.live import attach
    from mbx.live.exchange import agreed
    from mbx.live.save import Beside, How, save
    from mbx.live.sending import BUCKET

    assert plan.hf is not None  # the recipe was refused without
    with agreed():
        exports = writable(recipe.run_dir, "export")
        exports.mkdir(exist_ok=True)
        target = writable(exports, f"step_{step:07d}")
        there = target.is_dir()
    if there:  # whole: it gets its name last, when all ranks have looked
        return f"{target} is there already"
    # the stored checkpoint has the layers that are trained whole, and tells a student's weights from what it compares
    # itself with its teacher by; a live model needs all its weights to be read
    stored = recipe.lora.rank and (recipe.lora.modules_to_save or holds_casts(recipe))
    if stored or recipe.distill.hidden_weight:
        with agreed():
            if torch.distributed.get_rank() == 0:
                export_run(recipe.run_dir, target)
        return f"{target}: {'PEFT adapter' if recipe.lora.rank else 'Hugging Face model'}"
    m = recipe.model
    live = attach(chunks, plan.hf, mapping=m.mapping or None, allowed_keys=m.waived_keys)
    if recipe.lora.rank:
        lora = recipe.to_dict()["lora"]
        assert isinstance(lora, Mapping)
        live.save_adapters(target, trained(lora, base))
        return f"{target}: PEFT adapter"
    files = {TEMPLATE_FILE: template.encode()} if template else {}
    with beside_of(plan, base, recipe.run_dir / f"iter_{step:07d}") as found:
        carried = Beside() if found is None else Beside(found.tensors, found.copies, found.source)
        save(live, target, How("model", None, False, BUCKET, exact_norms=True, beside=carried), None, files)
    return f"{target}: Hugging Face model"


def _best(run_dir: Path) -> Path:
    number = read_best(run_dir).step
    if number < 0:
        raise UsageError(f"`{run_dir}` has no best checkpoint", hint="run.keep_best=true keeps one")
    name = f"iter_{number:07d}"
    found = next((path for path in finished(run_dir) if path.name == name), None)
    if found is None:
        raise UsageError(f"`{run_dir}` has lost its best checkpoint, {name}")
    return found
