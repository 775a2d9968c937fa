"""Ranks of a job that Megatron Core runs in processes of its own, as process groups and patches are process-wide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_ranks(worker: str, world: int, *arguments: object, timeout: float = 300) -> None:
    """Run `worker RANK WORLD ARGUMENT…` of this folder in `world` processes; AssertionError where one fails."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / worker), str(rank), str(world), *map(str, arguments)],
            env=env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=timeout)[1].decode(errors="replace") for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(error[-3000:] for error in errors)
