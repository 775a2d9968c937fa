"""Tensors kept beside a Megatron checkpoint stand in for nothing but what the model was built without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from converters.errors import CoverageError
from fixtures.make_tiny import make
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import kept_tensors
from mbx.formats.registry import open_model
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
