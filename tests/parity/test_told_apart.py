"""Weights that hide a wrong table: constants, and tensors that are equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _planted import convert
from _stores import Tensors, changed_hf

from mappings import table_text
from mbx.proof.parity import ParityReport, parity

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@pytest.fixture
def exchanged(tmp_path: Path) -> Path:
    """Llama's table with a layer's two norms exchanged."""
    one, other = (f'"{name}"' for name in NORMS)
    path = tmp_path / "exchanged.toml"
    path.write_text(table_text("llama").replace(one, "<>").replace(other, one).replace("<>", other))
    return path


def with_norms(tiny: Path, target: Path, value: float | None) -> Path:
    """The tiny Llama with every norm constant, or drawn."""

    def change(tensors: Tensors) -> None:
        torch.manual_seed(0)
        for name, tensor in tensors.items():
            if "norm" in name:
                tensor.copy_(torch.full_like(tensor, value) if value is not None else torch.rand_like(tensor) + 0.5)

    return changed_hf(tiny / "llama", target, change)


def compared(source: Path, target: Path, mapping: Path | None) -> ParityReport:
    table = None if mapping is None else str(mapping)
    return parity(source, convert(source, target, table), forward=True, mapping=table)


def test_a_table_of_ones_own_is_not_proved_by_norms_of_ones(tiny: Path, tmp_path: Path, exchanged: Path) -> None:
    report = compared(with_norms(tiny, tmp_path / "hf", 1.0), tmp_path / "mcore", exchanged)
    assert report.passed and not report.proved
    (gap,) = [gap.line for gap in report.gaps if gap.kind == "not told apart"]
    assert all(name in gap for name in NORMS)


def test_of_a_shipped_table_it_is_said_and_no_gap(tiny: Path, tmp_path: Path) -> None:
    report = compared(with_norms(tiny, tmp_path / "hf", 1.0), tmp_path / "mcore", None)
    assert report.proved
    (leg,) = [leg for leg in report.legs if leg.name == "forward"]
    assert any("not told apart" in line and NORMS[0] in line for line in leg.details)


def test_drawn_norms_show_the_exchange(tiny: Path, tmp_path: Path, exchanged: Path) -> None:
    report = compared(with_norms(tiny, tmp_path / "hf", None), tmp_path / "mcore", exchanged)
    assert {leg.name for leg in report.legs if leg.status == "failed"} == {"forward"}
