"""Prediction layers that a model was built without are compared where they lie: beside its checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fixtures.make_tiny import make
from mbx.formats.hf import KEPT
from mbx.proof.diff import diff
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run

LAYER = "model.layers.4."
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
CHANGED = "model.layers.4.enorm.weight"


@dataclass
class Sides:
    """A folder, and two checkpoints of it whose prediction layer lies beside; of the second, the file of that."""

    folder: Path
    first: Path
    second: Path

    @property
    def kept(self) -> Path:
        return self.second / "iter_0000000" / "hf" / KEPT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """DeepSeek-V3, and as a run without its prediction layer leaves it: converted from a folder that lacks that."""
    at = tmp_path_factory.mktemp("kept")
    folder, bare = make("deepseek_v3", at / "hf"), make("deepseek_v3", at / "bare")
    file = "model.safetensors"
    tensors = load_file(folder / file)
    save_file({n: t for n, t in tensors.items() if not n.startswith(LAYER)}, bare / file, {"format": "pt"})
    first = run(plan_hf_to_mcore(bare, at / "first", Options())).target
    ahead = {n: t for n, t in tensors.items() if n.startswith(LAYER) and not n.endswith(COPIES)}
    save_file(ahead, first / "iter_0000000" / "hf" / KEPT)
    return Sides(folder, first, first)


@pytest.fixture
def sides(made: Sides, tmp_path: Path) -> Sides:
    return Sides(made.folder, made.first, Path(shutil.copytree(made.first, tmp_path / "second")))


def test_a_changed_one_is_a_difference(sides: Sides) -> None:
    for other in (sides.first, sides.folder):
        before = diff(other, sides.second)
        assert not (before.removed or before.added or before.changes or before.gaps)
        assert next(leg for leg in parity(other, sides.second).legs if leg.name == "weights").status == "passed"
    tensors = load_file(sides.kept)
    tensors[CHANGED] += 1
    save_file(tensors, sides.kept)
    for other in (sides.first, sides.folder):
        found = diff(other, sides.second)
        assert [change.name for change in found.changes] == [CHANGED] and not found.same
        assert not parity(other, sides.second).passed


def test_what_one_side_alone_has_is_said(sides: Sides) -> None:
    count = len(load_file(sides.kept))
    sides.kept.unlink()
    found = diff(sides.first, sides.second)
    assert not found.same and [f"{count} tensors beside" in gap for gap in found.gaps] == [True]
    assert not parity(sides.first, sides.second).proved
    assert diff(sides.folder, sides.second).removed  # by Megatron's keys


def test_one_that_lacks_is_not_in_the_checkpoint(sides: Sides, tmp_path: Path) -> None:
    tensors = load_file(sides.kept)
    sides.kept.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if name != CHANGED}, sides.kept)
    assert diff(sides.folder, sides.second).removed == (CHANGED,)
    assert diff(sides.second, sides.folder).added == (CHANGED,)
    assert not parity(sides.folder, sides.second).passed
    alone = Path(shutil.copytree(sides.folder, tmp_path / "alone"))
    held = load_file(alone / "model.safetensors")
    save_file(
        {n: t for n, t in held.items() if not n.startswith(LAYER)}, alone / "model.safetensors", {"format": "pt"}
    )
    assert set(diff(alone, sides.first).added) == tensors.keys()
