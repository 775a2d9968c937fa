"""A run under torchrun whose processes are killed: started again, it ends with the losses of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from _torchrun import records, workers
from _torchrun import start as torchrun
from _trainings import raw

STEPS, RANKS = 30, 2


def start(folder: Path, restarts: int) -> subprocess.Popen[bytes]:
    """The run of `folder` on gloo, whose steps are slow enough to be met by a signal."""
    recipe = raw(
        folder / "run",
        train={"steps": STEPS, "micro_batch": 1, "global_batch": 16},
        data={"length": 64},
        run={"save_every": 4, "timeout_s": 20},
    )
    return torchrun(folder, recipe, RANKS, restarts)


def disturb(folder: Path, process: subprocess.Popen[bytes], signals: list[int], seed: int) -> None:
    """Send each of `signals` to a rank at some step; the run's end is awaited, and brought about where it hangs."""
    try:
        _disturb(folder, process, signals, seed)
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait(timeout=60)


def _disturb(folder: Path, process: subprocess.Popen[bytes], signals: list[int], seed: int) -> None:
    stream, until = random.Random(seed), time.monotonic() + 100 + 60 * len(signals)
    for number in signals:
        seen = len(records(folder / "run"))
        more = stream.randint(1, 6)
        while process.poll() is None and len(records(folder / "run")) < seen + more:
            assert time.monotonic() < until
            time.sleep(0.02)
        if process.poll() is None and (found := workers(process.pid)):
            os.kill(stream.choice(found), number)
    process.wait(timeout=max(1, until - time.monotonic()))


def ended(folder: Path) -> dict[int, float]:
    """The loss of every step, as last said."""
    return dict(records(folder / "run"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, 0)
    assert process.wait(timeout=240) == 0, (folder / "log").read_text()[-2000:]
    losses = ended(folder)
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", range(int(os.environ.get("MBX_KILLS", "3"))))
def test_a_killed_run_ends_as_an_undisturbed_one(undisturbed: dict[int, float], tmp_path: Path, seed: int) -> None:
    process = start(tmp_path, 5)
    disturb(tmp_path, process, [signal.SIGKILL] * (1 + seed % 3), seed)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert ended(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_stands_still_ends_the_others_and_the_run_goes_on(
    undisturbed: dict[int, float], tmp_path: Path
) -> None:
    process = start(tmp_path, 3)
    disturb(tmp_path, process, [signal.SIGSTOP], 0)
    said = (tmp_path / "log").read_text()
    assert process.returncode == 0, said[-2000:]
    assert "waited for another that died or did not answer within run.timeout_s=20" in said
    assert ended(tmp_path) == undisturbed
