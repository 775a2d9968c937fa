"""Norms stored with another offset: what rounding would lose comes back, what training changed stays changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.hf import KEPT
from mbx.run.execution import run
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf

NORM = "model.layers.0.linear_attn.norm.weight"


def source(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint whose gated norm holds values that lose bits when 1 is taken away and added again."""
    make("qwen3_next", folder)
    tensors = load_file(folder / "model.safetensors")
    awkward = torch.linspace(-3.0, 0.49, tensors[NORM].numel()).bfloat16()
    assert not torch.equal((awkward - 1) + 1, awkward)
    tensors[NORM] = awkward
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("tp", [1, 2])
def test_values_that_rounding_would_lose_come_back(tmp_path: Path, tp: int) -> None:
    source(tmp_path / "hf")
    run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options(layout=Layout(tp=tp))))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options()))
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_without_the_originals_only_the_offset_is_undone(tmp_path: Path) -> None:
    tensors = source(tmp_path / "hf")
    run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options()))
    (tmp_path / "mcore" / "iter_0000000" / "hf" / KEPT).unlink()
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options()))
    back = load_file(tmp_path / "back" / "model.safetensors")[NORM]
    assert torch.equal(back, ((tensors[NORM].float() - 1).bfloat16().float() + 1).bfloat16())
    assert not torch.equal(back, tensors[NORM])


def test_a_changed_value_is_not_replaced_by_the_original(tmp_path: Path) -> None:
    tensors = source(tmp_path / "hf")
    run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options()))
    trained = dict(tensors)
    trained[NORM] = tensors[NORM].clone()
    trained[NORM][::2] = 1.5
    (tmp_path / "other").mkdir()
    for file in (tmp_path / "hf").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    save_file(trained, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    run(plan_hf_to_mcore(tmp_path / "other", tmp_path / "trained", Options()))
    kept = tmp_path / "mcore" / "iter_0000000" / "hf" / KEPT
    (tmp_path / "trained" / "iter_0000000" / "hf" / KEPT).write_bytes(kept.read_bytes())
    run(plan_mcore_to_hf(tmp_path / "trained", tmp_path / "back", Options()))
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[NORM], trained[NORM])
