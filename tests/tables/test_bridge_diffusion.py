"""Megatron-Bridge's own diffusion models load our checkpoints, ask for nothing else, and compute what diffusers does.

Set MBX_BRIDGE_SOURCE to the folder `src` of a checkout of Megatron-Bridge; its main branch asks for Megatron Core
0.19, so run it in that environment (`make test-core`'s). No GPU and none of Bridge's other requirements are needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from converters.mcore.layout import Layout
from fixtures.diffusion import make_transformer
from mbx.formats.registry import open_checkpoint
from mbx.run.job import Options, plan_hf_to_mcore, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MBX_BRIDGE_SOURCE" not in os.environ, reason="MBX_BRIDGE_SOURCE names no checkout"),
]
WORKER = Path(__file__).parent / "_bridge_diffusion.py"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["wan", "wan2_2", "flux", "flux_schnell"])
def test_bridges_own_model_computes_what_diffusers_does(tmp_path: Path, name: str, tp: int) -> None:
    source = make_transformer(name, tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, layout=Layout(tp=tp))))
    command = [sys.executable, str(WORKER), os.environ["MBX_BRIDGE_SOURCE"], str(source), str(tmp_path / "mcore")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    held = {key: list(tensor.shape) for key, tensor in open_checkpoint(tmp_path / "mcore").tensors.items()}
    assert found["asked"] == held
    assert found["std"] > 0.1 and found["max_abs"] <= 1e-4
