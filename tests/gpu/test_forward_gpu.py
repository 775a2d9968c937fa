"""`mbx.proof.parity` on one GPU: Transformer Engine in fp32 against Transformers; needs `-m gpu`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mbx.models.device import Spread
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and HAVE_TE), reason="needs a GPU with Transformer Engine"),
]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_forward_agrees_on_a_gpu(tiny: Path, tmp_path: Path, name: str) -> None:
    run(plan_hf_to_mcore(tiny / name, tmp_path / "mcore", Options(sync=False)))
    leg = parity(tiny / name, tmp_path / "mcore", forward=True, spread=Spread(device="cuda")).legs[-1]
    assert leg.status == "passed", leg
    assert "cuda, Transformer Engine spec" in leg.details[0]


def test_swapped_gate_and_up_fail_on_a_gpu(tiny: Path, tmp_path: Path) -> None:
    from mappings import table_text

    own = tmp_path / "own.toml"
    right, wrong = '"mlp.gate_proj.weight", "mlp.up_proj.weight"', '"mlp.up_proj.weight", "mlp.gate_proj.weight"'
    assert right in table_text("qwen3")
    own.write_text(table_text("qwen3").replace(right, wrong))
    run(plan_hf_to_mcore(tiny / "qwen3", tmp_path / "mcore", Options(mapping=str(own), sync=False)))
    leg = parity(
        tiny / "qwen3", tmp_path / "mcore", forward=True, spread=Spread(device="cuda"), mapping=str(own)
    ).legs[-1]
    assert leg.status == "failed"
