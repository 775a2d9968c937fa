"""Every family trained, exported and compared: `python tests/gpu/run_train_families.py --device cuda --out DIR`.

Each family's tiny checkpoint trains ten steps in `mbx train`'s loop and is exported to a Hugging Face folder, whose
logits in Transformers must be Megatron Core's from the run's own checkpoint. DIR gets `train_families.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from _alone import run_alone  # noqa: E402


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table on stdout."""
    losses = f"{found['first_loss']:.4f} → {found['last_loss']:.4f}" if "last_loss" in found else "-"
    figures = [
        found.get(key, {}).get("max_abs")
        for key in ("against_transformers_on_cpu", "against_transformers_on_cuda", "control")
    ]
    columns = [f"{value:8.1e}" if isinstance(value, float) else "       -" for value in figures]
    return "  ".join([f"{name:18}", f"{found['status']:8}", f"{losses:17}", *columns, found.get("reason", "")[:200]])


def main() -> int:
    from fixtures.make_tiny import NAMES

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; all without a name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for train_families.json")
    parser.add_argument("--tiny", type=Path, help="folder of checkpoints by name; made on the spot without it")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit-s", type=float, default=300.0, help="all families together, in seconds")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit_s
    arguments.out.mkdir(parents=True, exist_ok=True)
    families: dict[str, Any] = {}
    sys.stdout.write("family, status, loss; max|d| to Transformers on cpu, on cuda, of the control\n")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        names = arguments.names or list(NAMES)
        runs = {}
        for number, name in enumerate(names):
            gpu = {"CUDA_VISIBLE_DEVICES": str(number % max(1, arguments.gpus)), "PYTHONWARNINGS": "ignore"}
            runs[name] = pool.submit(
                run_alone, "_train_family.py", name, arguments.device, arguments.tiny, deadline, os.environ | gpu
            )
        for name, future in runs.items():
            families[name] = future.result()
            sys.stdout.write(line(name, families[name]) + "\n")
            sys.stdout.flush()
            # Written anew each time: whatever ends this process leaves the families before it.
            (arguments.out / "train_families.json").write_text(json.dumps(families, indent=1), encoding="utf-8")
    return 1 if any(found["status"] == "failed" for found in families.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
