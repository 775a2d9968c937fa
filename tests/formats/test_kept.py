"""Tensors kept beside a Megatron checkpoint stand in for nothing but what the model was built without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError, StorageError
from fixtures.diffusion import make_transformer
from fixtures.make_tiny import make
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import KEPT, kept_tensors
from mbx.formats.registry import open_model
from mbx.formats.views import hf_view
from mbx.run.job import Options, export_plan, plan_hf_to_mcore, run


def converted(family: str, folder: Path, options: Options | None = None) -> Path:
    """A tiny model as a Megatron checkpoint."""
    source = make(family, folder / family)
    return run(plan_hf_to_mcore(source, folder / f"{family}-mcore", options or Options())).target


def without(opened: Checkpoint, part: str) -> Checkpoint:
    """A checkpoint that lacks the keys that hold `part`."""
    left = {name: tensor for name, tensor in opened.tensors.items() if part not in name}
    assert len(left) < len(opened.tensors)
    return replace(opened, tensors=left)


@pytest.mark.parametrize("part", ["self_attention.out_norm.weight", "mtp.layers.0.enorm.weight"])
def test_a_key_that_lacks_is_not_made_of_the_original(part: str, tmp_path: Path) -> None:
    """Norms that are shifted are kept as they were read: their values are not those that were trained since."""
    at = converted("qwen3_next", tmp_path)
    opened = open_model(at)
    found = architecture_of(opened)
    assert found.reference is not None and kept_tensors(opened.iteration, found.reference)
    export_plan(opened, found, Options())
    with pytest.raises(CoverageError, match=part.rpartition(".layers.")[2]):
        export_plan(without(opened, part), found, Options())


def edited(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A file of tensors with others in it."""
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """DeepSeek-V3 without its prediction layer, which lies beside it."""
    folder = tmp_path_factory.mktemp("left-out")
    at = converted("deepseek_v3", folder)
    opened = without(open_model(at), "mtp.layers.")
    layer = load_file(folder / "deepseek_v3" / "model.safetensors")
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    ahead = {
        name: one for name, one in layer.items() if name.startswith("model.layers.4.") and not name.endswith(copies)
    }
    assert opened.hf is not None
    save_file(ahead, opened.hf / KEPT)
    return opened


@pytest.fixture
def checkpoint(left_out: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The same, to be changed."""
    assert left_out.hf is not None
    folder = Path(shutil.copytree(left_out.hf, tmp_path / "hf"))
    return replace(left_out, hf=folder)


EH, NORM = "model.layers.4.eh_proj.weight", "model.layers.4.enorm.weight"
PLANTED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another layer": (lambda t: t.update({"model.layers.9.evil.weight": torch.ones(3, 7)}), "9.evil.weight.*had not"),
    "a path": (lambda t: t.update({"../../x": torch.ones(2)}), r"\.\./x`.*had not"),
    "another shape": (lambda t: t.update({EH: torch.ones(3, 7)}), r"eh_proj.weight`, of shape \[3, 7\]"),
    "another dtype": (lambda t: t.update({EH: t[EH].to(torch.int8)}), "eh_proj.weight`, I8"),
    "one that lacks": (lambda t: t.pop(EH), "lacks 1 tensor of prediction layers, first `model.layers.4.eh_proj"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_kept_is_what_was_recorded(name: str, checkpoint: Checkpoint) -> None:
    assert checkpoint.hf is not None
    change, said = PLANTED[name]
    found = architecture_of(checkpoint)
    assert EH in {draft.name for draft in export_plan(checkpoint, found, Options())[0].drafts}
    edited(checkpoint.hf / KEPT, change)
    for read in (lambda: export_plan(checkpoint, found, Options()), lambda: hf_view(checkpoint)):
        with pytest.raises(StorageError, match=said):
            read()


def test_floats_of_another_width_may_be_kept(checkpoint: Checkpoint) -> None:
    """A run keeps what it began from, which need not be of the dtype of the folder that its config is of."""
    assert checkpoint.hf is not None
    edited(checkpoint.hf / KEPT, lambda tensors: tensors.update({NORM: tensors[NORM].float()}))
    plan = export_plan(checkpoint, architecture_of(checkpoint), Options())[0]
    assert {draft.name: draft.dtype for draft in plan.drafts}[NORM] == "F32"


def test_an_export_without_what_was_beside_says_so(checkpoint: Checkpoint) -> None:
    assert checkpoint.hf is not None
    (checkpoint.hf / KEPT).unlink()
    plan = export_plan(checkpoint, architecture_of(checkpoint), Options())[0]
    assert EH not in {draft.name for draft in plan.drafts}
    assert any("not written: prediction layers" in note and "config.json" in note for note in plan.notes)


def test_an_image_branch_comes_whole_or_is_said_to_lack(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="makes the folder")
    source = make_transformer("wan_i2v", tmp_path / "wan")
    at = run(plan_hf_to_mcore(source, tmp_path / "mcore", Options())).target
    opened = open_model(at)
    found = architecture_of(opened)
    assert opened.hf is not None and not [n for n in export_plan(opened, found, Options())[0].notes if "written" in n]
    edited(opened.hf / KEPT, lambda tensors: tensors.popitem())
    with pytest.raises(StorageError, match="lacks 1 tensor of what stands beside the model"):
        export_plan(opened, found, Options())
    (opened.hf / KEPT).unlink()
    notes = export_plan(opened, found, Options())[0].notes
    assert any(note.startswith("not written: what stands beside the model") for note in notes)
