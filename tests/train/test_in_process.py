"""A rank that fails, and a run that starts again in the same processes; `make resiliency` brings what restarts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _torchrun import records, workers
from _trainings import ROOT, raw
from test_stragglers import place

from converters.errors import StorageError, UsageError
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.toml import dump_toml
from mbx.train.run import restarts, stragglers

STEPS, FAULT = 10, 6
#: A file of hooks that lets a rank fail where step 6 begins, as often as it says.
PLANTED = """
import os
from mbx.train.run import loop
plain, left = loop.learning_rate, [{times}]

def learning_rate(optim, step, steps):
    if os.environ["RANK"] in "{ranks}" and step == {fault} - 1 and left[0]:
        left[0] -= 1
        {what}
    return plain(optim, step, steps)

loop.learning_rate = learning_rate

def on_step(step):
    pass
"""


def started(
    folder: Path,
    beside: str,
    *words: str,
    times: int = 0,
    ranks: str = "1",
    what: str = "raise RuntimeError('planted')",
) -> subprocess.Popen[bytes]:
    """Two ranks under torchrun, tensor parallelism between them, which save at step 4."""
    folder.mkdir()
    recipe = raw(
        folder / "run",
        train={"steps": STEPS, "micro_batch": 1, "global_batch": 8, "deterministic": True},
        run={"save_every": 4, "timeout_s": 20},
        parallel={"tp": 2},
    )
    (folder / "recipe.toml").write_text(dump_toml(parse_recipe(recipe).to_dict()))
    (folder / "own.py").write_text(PLANTED.format(ranks=ranks, times=times, fault=FAULT, what=what))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mbx"]
    command += ["train", "--recipe", str(folder / "recipe.toml"), "--hooks", str(folder / "own.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{beside}"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=200)
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_a_run_starts_again_and_is_the_same_run(tmp_path: Path) -> None:
    """Rank 1 fails at step 6, with a checkpoint of step 4: all ranks go on from there, to the bit."""
    beside = place()
    assert ended(started(tmp_path / "plain", beside)) == 0
    plain = records(tmp_path / "plain" / "run")
    process = started(tmp_path / "again", beside, "--in-process-restarts", "2", times=1)
    own: set[int] = set()
    while process.poll() is None:
        own |= set(workers(process.pid))
        time.sleep(0.2)
    log = (tmp_path / "again" / "log").read_text()
    assert ended(process) == 0, log[:6000]
    again = records(tmp_path / "again" / "run")
    assert [step for step, _ in again] == [*range(1, FAULT), *range(5, STEPS + 1)]
    assert dict(again) == dict(plain) and len(own) == 2
    assert "planted" in log and "resuming" in log


@pytest.mark.slow
def test_the_last_fault_ends_the_run(tmp_path: Path) -> None:
    beside = place()
    process = started(tmp_path / "run", beside, "--in-process-restarts", "1", times=9)
    assert ended(process) != 0
    log = (tmp_path / "run" / "log").read_text()
    steps = [step for step, _ in records(tmp_path / "run" / "run")]
    assert steps == [*range(1, FAULT), 5] and "RuntimeError: planted" in log


@pytest.mark.slow
def test_a_process_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    """A world of one rank less would be another run."""
    beside = place()
    kill = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    process = started(tmp_path / "run", beside, "--in-process-restarts", "3", times=1, what=kill)
    assert ended(process) != 0
    assert [step for step, _ in records(tmp_path / "run" / "run")] == [*range(1, FAULT)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["0 1", "1"])
def test_what_every_start_would_meet_is_said_at_once(tmp_path: Path, ranks: str) -> None:
    """An error of the house that all ranks raise, as they do over a loss that is no number; or one, as over its disk,
    which the other waits for: no start follows, and both end with its words."""
    beside = place()
    what = "raise __import__('converters.errors', fromlist=['errors']).DifferenceError('as it is', hint='so be it')"
    process = started(tmp_path / "run", beside, "--in-process-restarts", "3", times=9, ranks=ranks, what=what)
    assert ended(process) != 0
    log = (tmp_path / "run" / "log").read_text()
    assert "error: as it is" in log and "hint: so be it" in log and "resuming" not in log
    assert "error: rank" not in log and "exitcode  : 1 " in log, log[-3000:]
    assert [step for step, _ in records(tmp_path / "run" / "run")] == [*range(1, FAULT)]


def test_the_words_of_the_end_reach_every_rank() -> None:
    """Through the store, as the kind that gives the exit code; the first of two stays."""

    class OwnError(StorageError):
        pass

    store = torch.distributed.HashStore()
    assert restarts._said(store) is None
    restarts._say(store, OwnError("no room for ‹out›", hint="make some", details=lambda: ["a", "b"]))
    restarts._say(store, UsageError("something else"))
    found = restarts._said(store)
    assert type(found) is StorageError and (found.fact, found.hint) == ("no room for ‹out›", "make some")
    assert found.details == ("a", "b") and found.exit_code == 4


def test_restarts_need_the_extension_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts.check_restarts(0)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(restarts, "check_extension", lambda why: None)
    with pytest.raises(UsageError, match="RANK is not set"):
        restarts.check_restarts(2)
    monkeypatch.undo()
    # the line itself looks for pip, at which setuptools turns away from its own distutils for good
    monkeypatch.setattr(stragglers, "install_line", str)
    monkeypatch.setattr(stragglers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="2 restarts within the processes are asked for, but nvidia-resiliency-ext"):
        restarts.check_restarts(2)
