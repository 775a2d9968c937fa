"""What makes a written checkpoint whole: what lies beside its tensors, and the word that all of it is there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.peft_keys import live_spelling
from converters.errors import StorageError
from mbx.formats import hf
from mbx.models.stored import read_whole
from mbx.torchfile.dcp import read_dcp
from mbx.train.checkpoints.beside import Beside, beside_of
from mbx.train.checkpoints.state import RECIPE, STATE, LoopState, finished
from mbx.train.checkpoints.whole import sync, write_whole
from mbx.train.data.templates import TEMPLATE_FILE
from mbx.train.model.blueprint import Blueprint
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    import torch

#: What a run writes into the folder of a checkpoint, drafts included.
_OURS = re.compile(
    rf"\.metadata(?:\.tmp)?|metadata\.json|common\.pt|__\d+_\d+\.distcp|hf|{RECIPE}|{Path(STATE).stem}\.(?:json|tmp)"
)


def complete(
    target: Path,
    recipe: Recipe,
    plan: Blueprint,
    template: str,
    state: LoopState,
    tower: Mapping[str, torch.Tensor],
    last: Path | None,
) -> None:
    """Add what is beside the tensors, look whether all ranks' files are there, and have all of it on the disk.

    The loop's state is written last of all. StorageError or OSError where something is missing or does not fit.
    `tower`: the tensors of one that is trained. `last`: the run's checkpoint before this one.
    """
    (target / RECIPE).write_text(json.dumps(recipe.to_dict(), indent=1), encoding="utf-8")
    if plan.hf is not None:
        (target / "hf").mkdir()
        for name in hf.side_files(plan.hf):
            (target / "hf" / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(plan.hf / name, target / "hf" / name)
        if template:  # what was trained is served by the template that it was trained with
            (target / "hf" / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        if hf.has_weights(plan.hf):  # a random start needs none
            layout = hf.record_layout(hf.open_hf(plan.hf))
            (target / "hf" / hf.LAYOUT).write_text(layout, encoding="utf-8")
        if not recipe.lora.rank:
            with beside_of(plan, state.base, last) as found:
                _keep(target / "hf" / hf.KEPT, plan, found, tower)
    read_dcp(target)
    for path in target.rglob("*"):
        sync(path)
    write_whole(target, STATE, json.dumps(asdict(state)))


def tidy(run: Path, stays: Collection[int], keep: int, say: Callable[[str], object]) -> None:
    """Remove a run's checkpoints but its last `keep` (0: all) and those of steps that stay; and unfinished ones."""
    whole = finished(run)
    left = {*(whole[-keep:] if keep else whole), *(run / f"iter_{step:07d}" for step in stays)}
    for old in run.glob("iter_*"):
        if old not in left:
            try:
                if is_ours(old):
                    shutil.rmtree(old)
            except OSError as error:  # what was written is whole all the same
                say(f"`{old}` could not be removed: {error.strerror}")


def is_ours(folder: Path) -> bool:
    """Whether a folder is named as a checkpoint is, and holds what a run writes into one, whole or in part."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r"iter_\d{7,}(?:\.\w+)?", folder.name):
        return False
    return all(_OURS.fullmatch(path.name) for path in folder.iterdir())


def _keep(file: Path, plan: Blueprint, found: Beside | None, tower: Mapping[str, torch.Tensor]) -> None:
    """Write what lies beside the text model, as it is in the folder that the weights came from or, of a tower that
    is trained, in the model, and prediction layers that were left out: an export is whole again."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if found is None:
        return
    try:
        if tower:
            assert plan.table is not None and plan.hf is not None
            live = live_spelling(plan.table, found.names)
            tensors = {name: tower[live.said(name)].contiguous() for name in found.towers}
            save_file(tensors | {name: read_whole(one, found.source) for name, one in found.ahead.items()}, file)
        elif found.tensors:
            with file.open("wb") as out:
                out.writelines(hf.pack_kept([*found.tensors.values()], found.source))
    except SafetensorError as error:
        raise StorageError(f"`{file}`: {error}") from error
