"""Where kernels for GPUs are installed, as on every machine that trains: the reference computes without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.make_tiny import make

ROOT = Path(__file__).resolve().parents[2]
_KERNEL = 'def {name}(*arguments, **named):\n    raise RuntimeError("Expected x.is_cuda() to be true")\n'
_RUN = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mbx.models.prompts import Batch
from mbx.models.transformers.tracing import trace_transformers

first, second = map(Path, sys.argv[1:])
ids = torch.arange(12)[None]
trace = trace_transformers(first, [Batch(ids)])
print("finite:", bool(trace.head(0, 251).isfinite().all()))
try:
    AutoModelForCausalLM.from_pretrained(second)(ids)
except RuntimeError as error:
    print("with kernels:", error)
import causal_conv1d
"""


@pytest.mark.timeout(120)
def test_the_reference_runs_on_a_cpu_beside_kernels_that_do_not(tmp_path: Path) -> None:
    """The second model is loaded as anyone loads it: its kernels were taken, so the first one's would have been."""
    package = tmp_path / "packages" / "causal_conv1d"
    package.mkdir(parents=True)
    text = "".join(_KERNEL.format(name=name) for name in ("causal_conv1d_fn", "causal_conv1d_update"))
    (package / "__init__.py").write_text(text, encoding="utf-8")
    models = [tmp_path / name for name in ("qwen3_5_text", "qwen3_next")]
    for model in models:
        make(model.name, model)
    command = [sys.executable, "-c", _RUN, *map(str, models)]
    env = {**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, cwd=ROOT)
    assert ran.stdout.splitlines() == ["finite: True", "with kernels: Expected x.is_cuda() to be true"], ran.stderr
    assert "falling back" not in ran.stderr.split("Loading weights")[0], "what the reference runs on is no news"
