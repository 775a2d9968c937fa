"""Faults of a machine at random moments of a run under torchrun: it ends with the losses of an undisturbed one.

`make kills` prints the seed and what was done: ranks killed, ranks stopped, the disk full, the mount gone.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from _faults import lost, whole
from _torchrun import records, start, workers
from _trainings import ROOT, Raw, raw, run_world

from mbx.train.checkpoints.state import latest

RANKS = 4
KILLS = int(os.environ.get("MBX_KILLS", "6"))
SEED = int(os.environ.get("MBX_KILLS_SEED", "") or random.SystemRandom().randrange(1 << 32))
KINDS = ("kill", "stop", "full", "vanish")
_MIB = 1 << 20


class Mounted:
    """A run's folder on a file system of its own, of 24 MiB, that is mounted where the run looks for it."""

    def __init__(self, folder: Path) -> None:
        self.disk, self.run = folder / "disk", folder / "run"
        self.disk.mkdir()
        self.run.mkdir()
        self._call("mount", "-t", "tmpfs", "-o", "size=24m", "none", str(self.disk))
        (self.disk / "run").mkdir()
        self.come_back()

    @staticmethod
    def _call(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    def fill(self, ranks: list[int]) -> None:
        """Leave no byte free."""
        del ranks
        with (self.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(_MIB)):
                pass

    def clear(self, ranks: list[int]) -> None:
        """Take that back."""
        del ranks
        (self.disk / "filler").unlink()

    def vanish(self) -> None:
        """Unmount the run's folder: an empty one stands there."""
        self._call("umount", "-l", str(self.run))

    def come_back(self) -> None:
        """Mount it; nothing was written where it was not."""
        assert not list(self.run.iterdir())
        self._call("mount", "--bind", str(self.disk / "run"), str(self.run))

    def close(self) -> None:
        """Unmount everything."""
        for place in (self.run, self.disk):
            subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


class Plain:
    """Where nothing can be mounted: a limit on the ranks' files, and a folder that is moved away."""

    def __init__(self, folder: Path) -> None:
        self.run, self.away = folder / "run", folder / "away"

    def _limit(self, ranks: list[int], size: int) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def fill(self, ranks: list[int]) -> None:
        """Let no file of these ranks grow beyond 16 KiB."""
        self._limit(ranks, 1 << 14)

    def clear(self, ranks: list[int]) -> None:
        """Take that back."""
        self._limit(ranks, resource.RLIM_INFINITY)

    def vanish(self) -> None:
        """Move the run's folder away."""
        self.run.rename(self.away)

    def come_back(self) -> None:
        """Move it back; nothing was made where it was not."""
        assert not self.run.exists()
        self.away.rename(self.run)

    def close(self) -> None:
        """Leave what is there."""


@pytest.fixture(params=["mounted", "plain"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted | Plain]:
    if request.param == "mounted":
        try:
            found: Mounted | Plain = Mounted(tmp_path)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no file system can be mounted here")
    else:
        found = Plain(tmp_path)
    yield found
    found.close()


def recipe(run: Path, steps: int, **run_keys: object) -> Raw:
    """The tiny Llama; `storage` says which layout, so that both are met."""
    return raw(
        run,
        model={"path": str(ROOT / "fixtures" / "tiny" / "llama")},
        data={"length": 16},
        train={"steps": steps, "micro_batch": 1, "global_batch": 4},
        run={"save_every": 2, "timeout_s": 30, **run_keys},
    )


def disturb(
    process: subprocess.Popen[bytes], storage: Mounted | Plain, kinds: list[str], stream: random.Random
) -> None:
    """Bring about each of `kinds` at some moment, half of them while a checkpoint is written."""
    for kind in kinds:
        await_moment(process, storage.run, stream)
        if process.poll() is not None:
            return
        ranks = workers(process.pid)
        if kind == "kill" and ranks:
            os.kill(stream.choice(ranks), signal.SIGKILL)
        elif kind == "stop" and ranks:
            stop(process, stream.choice(ranks))
        elif kind == "full":
            storage.fill(ranks)
            time.sleep(stream.uniform(0.5, 3))
            storage.clear(ranks)
        elif kind == "vanish":
            storage.vanish()
            time.sleep(stream.uniform(0.5, 3))
            storage.come_back()


def stop(process: subprocess.Popen[bytes], rank: int) -> None:
    """Stop a rank until another has ended for it; then it is killed, ahead of the half minute that torchrun takes."""
    before = set(workers(process.pid))
    os.kill(rank, signal.SIGSTOP)
    until = time.monotonic() + 120
    while before <= set(workers(process.pid)):
        assert time.monotonic() < until, "the others wait for a rank that stands still"
        time.sleep(0.1)
    os.kill(rank, signal.SIGKILL)


def await_moment(process: subprocess.Popen[bytes], run: Path, stream: random.Random) -> None:
    """Wait until the run has gone on by some steps, and then for a draft of a checkpoint or a part of a second."""
    seen, more, until = len(records(run)), stream.randint(1, 4), time.monotonic() + 240
    while process.poll() is None and len(records(run)) < seen + more:
        assert time.monotonic() < until, "the run stands still"
        time.sleep(0.02)
    if stream.random() < 0.5:
        time.sleep(stream.uniform(0, 0.5))
        return
    while process.poll() is None and not list(run.glob("iter_*.*")):
        assert time.monotonic() < until, "the run saves no more"
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_on_a_machine_that_fails_ends_as_an_undisturbed_one(storage: Mounted | Plain, tmp_path: Path) -> None:
    mounted = isinstance(storage, Mounted)
    stream = random.Random(SEED + mounted)
    half = KILLS // 2 + (KILLS % 2 and mounted)
    kinds = [KINDS[number % len(KINDS)] for number in range(half)]
    stream.shuffle(kinds)
    steps = 20 + 6 * half
    axes = {"tp": 2} if mounted else {"tp": 2, "pp": 2}
    asked = recipe(storage.run, steps, save_async=not mounted) | {"parallel": axes}
    calm = recipe(tmp_path / "calm", steps, save=False) | {"parallel": axes}
    ((*losses,),) = run_world(RANKS, [{"recipe": calm}], tmp_path / "calm.json")

    process = start(tmp_path, asked, RANKS, restarts=10 * half)
    try:
        disturb(process, storage, kinds, stream)
        process.wait(timeout=900)
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait(timeout=60)
    said, done = (tmp_path / "log").read_text(), Counter(kinds)
    drafts = [path.name for path in storage.run.glob("iter_*") if path.suffix]
    sys.stdout.write(f"\nseed {SEED}, {axes}: {dict(done)}; saves given up: {len(lost(storage.run))}\n")
    if kept := os.environ.get("MBX_KILLS_LOG"):
        shutil.copyfile(tmp_path / "log", kept)
    assert process.returncode == 0, said[-4000:]
    assert dict(records(storage.run)) == dict(enumerate(losses, 1))
    assert latest(storage.run) == storage.run / f"iter_{steps:07d}" and not drafts
    assert all(whole(path) for path in storage.run.glob("iter_*"))
    assert said.count("failed (exitcode") <= done["kill"] + done["stop"], "a full disk or a vanished mount ended ranks"
    assert "internal:" not in said
