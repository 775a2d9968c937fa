"""Ranks of a job that Megatron Core runs in processes of its own, as process groups and patches are process-wide."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.forks import start

HERE = Path(__file__).resolve().parent


def run_ranks(worker: str, world: int, *arguments: object, timeout: float = 300) -> None:
    """Run `worker RANK WORLD ARGUMENT…` of this folder in `world` processes; AssertionError where one fails."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(world)]
        ranks = [
            start(rank, HERE / worker, rank, world, *arguments, log=log, PYTHONPATH=paths)
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [rank.wait(timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        said = [log.read_text(encoding="utf-8", errors="replace")[-3000:] for log in logs]
    assert codes == [0] * world, "\n".join(said)
