"""One family in a process of its own, so that no failure reaches another family: the parent's side, and the child's.

The child is `python SCRIPT NAME DEVICE TINY RESULT` and leaves what it found as JSON in RESULT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
# Before torch: cuBLAS reads the first when it starts, Transformer Engine the second at each call.
os.environ |= {
    "NVIDIA_TF32_OVERRIDE": "0",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "HF_HUB_OFFLINE": "1",
}

from converters.errors import MbxError  # noqa: E402

Found: TypeAlias = dict[str, Any]
#: Family, device, folder of tiny checkpoints if there is one, work folder, and where to put what is found.
Measure: TypeAlias = Callable[[str, str, "Path | None", Path, Found], None]


def run_alone(
    script: str, name: str, device: str, tiny: Path | None, deadline: float, env: Mapping[str, str] | None = None
) -> Found:
    """What `script` of this folder finds for a family; a crash or the `deadline` (monotonic) is its result."""
    left = deadline - time.monotonic()
    if left < 5:
        return {"status": "not run", "reason": "no time was left"}
    with tempfile.TemporaryDirectory() as work:
        result = Path(work) / "result.json"
        command = [sys.executable, str(HERE / script), name, device, str(tiny.resolve()) if tiny else "", str(result)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=ROOT, env=env)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"did not end within {left:.0f} s"}
        if result.is_file():
            found: Found = json.loads(result.read_text(encoding="utf-8"))
            return found
        return {"status": "failed", "reason": f"ended with code {child.returncode}", "traceback": child.stderr[-4000:]}


def report(measure: Measure) -> None:
    """The child: `measure` with this process's arguments; what fails is a `reason` beside what was found before it."""
    import torch

    torch.set_num_threads(1)
    name, device, tiny, result = sys.argv[1:5]
    found: Found = {"status": "not run"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        try:
            if device == "cuda":
                import transformer_engine.pytorch  # noqa: F401  # before any CUDA op
            measure(name, device, Path(tiny) if tiny else None, Path(work), found)
        except MbxError as error:
            found["reason"] = " ".join([error.fact, *error.details[:3]]).replace(work, "…")[:400]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is one
            found["status"] = "failed"
            found["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace(work, "…")
            found["traceback"] = traceback.format_exc()[-4000:]
    found["seconds"] = round(time.monotonic() - started, 1)
    Path(result).write_text(json.dumps(found), encoding="utf-8")
