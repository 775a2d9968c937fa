"""Disks that are full and mounts that are gone while a run trains: it goes on, and nothing half-valid is left."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from _faults import EVERYWHERE, Planted, full, lost, places, whole
from _trainings import Raw, raw, run_here, run_world

from converters.errors import DeviceError, StorageError, UsageError
from mbx.train.checkpoints import store
from mbx.train.checkpoints.best import read_best
from mbx.train.checkpoints.claim import START
from mbx.train.checkpoints.state import latest
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run import keeping
from mbx.train.run.log import METRICS, Log, Step
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare


@pytest.fixture
def planted() -> Iterator[Planted]:
    fault = Planted()
    yield fault
    fault.plant(None)


def recipe(run: Path, steps: int, **run_keys: object) -> Raw:
    sizes: dict[str, object] = {"steps": steps, "micro_batch": 2, "global_batch": 4}
    return raw(run, train=sizes, run={"save_every": 1, "keep": 0, **run_keys})


def go(asked: Raw, on_step: object = lambda _: None) -> list[float]:
    return list(train(prepare(parse_recipe(asked)), live=False, on_step=on_step).losses)  # type: ignore[arg-type]


def left(run: Path) -> list[int]:
    """Steps of the checkpoints that are there; each is whole, and nothing else is there."""
    found = sorted(run.glob("iter_*"))
    assert all(whole(path) for path in found)
    return [int(path.name.removeprefix("iter_")) for path in found]


def steps_of(run: Path) -> list[int]:
    records = map(json.loads, (run / METRICS).read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == "step"]


def test_a_save_that_fails_anywhere_costs_that_save_alone(tmp_path: Path, planted: Planted) -> None:
    run = tmp_path / "run"
    by_step = dict(enumerate(places(), 1))
    steps = len(by_step) + 1
    losses = go(recipe(run, steps), lambda step: planted.plant(by_step.get(step.step)))
    assert len(losses) == steps and steps_of(run) == list(range(1, steps + 1))
    assert lost(run) == [f"iter_{step:07d}" for step in by_step]
    named_last = len(by_step)  # whole, but for the tracker
    assert left(run) == [named_last, steps] and latest(run) == run / f"iter_{steps:07d}"


@pytest.mark.slow
def test_a_save_beside_the_run_that_fails_anywhere_costs_that_save_alone(
    tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault lasts from the save to its end, which is that of the next step."""
    run, settle = tmp_path / "run", store.Store.settle
    monkeypatch.setattr(store.Store, "settle", lambda self, *, wait: settle(self, wait=True))
    by_step = {2 * number: place for number, place in enumerate(places(), 1)}
    steps = 2 * len(by_step) + 3
    asked = recipe(run, steps, save_async=True, save_every=2)
    go(asked, lambda step: planted.plant(by_step.get(step.step // 2 * 2)))
    assert lost(run) == [f"iter_{step:07d}" for step in by_step]
    assert left(run) == [steps - 3, steps - 1, steps] and latest(run) == run / f"iter_{steps:07d}"


def test_the_last_save_ends_the_run_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which names the file, the bytes it takes and those that are there, and where the run goes on."""
    run, usage = tmp_path / "run", shutil.disk_usage(tmp_path)

    def on_step(step: Step) -> None:
        if step.step == 2:
            monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(DeviceError) as caught:
        go(recipe(run, 3), on_step)
    assert caught.value.fact.startswith(
        f"`{run}/iter_0000003` could not be written: No space left on device; it takes "
    )
    assert "MB, and 1.00 kB are free there" in caught.value.fact
    assert (caught.value.hint or "").endswith("‹resume› continues from iter_0000001")
    assert left(run) == [1] and lost(run) == ["iter_0000002"]


def test_a_folder_that_is_away_for_a_while(tmp_path: Path) -> None:
    """As a mount that vanishes: nothing is written where it was, and what was not written waits."""
    run, away = tmp_path / "run", tmp_path / "away"

    def on_step(step: Step) -> None:
        if step.step == 2:
            run.rename(away)
        if step.step == 4:
            assert not run.exists()
            away.rename(run)

    disturbed = go(recipe(run, 5), on_step)
    assert left(run) == [1, 4, 5] and steps_of(run) == [1, 2, 3, 4, 5]
    assert lost(run) == ["iter_0000002", "iter_0000003"]
    assert disturbed == run_here(recipe(tmp_path / "whole", 5, save=False))


def test_an_empty_folder_below_a_mount_is_not_the_runs(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"

    def on_step(step: Step) -> None:
        if step.step == 2:
            run.rename(away)
            run.mkdir()

    with pytest.raises(StorageError, match=r"is not there: it was moved, or the storage that it lies on is gone"):
        go(recipe(run, 3), on_step)
    assert not run.exists() and left(away) == [1]  # an empty folder goes


def test_a_run_that_another_start_took_over_saves_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def on_step(step: Step) -> None:
        if step.step == 2:
            (run / START).write_text("another")

    with pytest.raises(UsageError, match="taken over by another start"):
        go(recipe(run, 4), on_step)
    assert left(run) == [1]


def test_records_wait_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(parse_recipe(raw(tmp_path / "run")), main=True, messages=False)
    write = os.write

    def some(file: int, data: bytes) -> int:
        if len(data) < 10:
            full()
        return write(file, data[: len(data) // 2])

    log.note(kind="first")
    monkeypatch.setattr(os, "write", some)
    log.note(kind="second", words="a record that is written in part, and taken back")
    log.note(kind="third")
    with pytest.raises(OSError, match=METRICS) as caught:
        log.finish()
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "run" / METRICS).read_text() == '{"kind": "first"}\n'
    monkeypatch.undo()
    log.finish()
    records = map(json.loads, (tmp_path / "run" / METRICS).read_text().splitlines())
    assert [record["kind"] for record in records] == ["first", "second", "third"]


def test_a_limit_on_files_costs_the_saves_under_it(tmp_path: Path) -> None:
    """The system's own error, met by the processes that write."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(step: Step) -> None:
        small = step.step in (2, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if small else before[0], before[1]))

    go(recipe(run, 4), on_step)
    assert left(run) == [1, 4] and lost(run) == ["iter_0000002", "iter_0000003"]


def test_the_best_step_is_one_that_was_written(
    tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation whose checkpoint or whose file fails is told; the next one says it again."""
    run, write = tmp_path / "run", keeping.write_best

    def on_step(step: Step) -> None:
        planted.plant("tensors" if step.step == 2 else None)
        monkeypatch.setattr(keeping, "write_best", full if step.step == 4 else write)

    asked = recipe(run, 4, save_every=0, keep=1, keep_best=True)
    asked["train"] |= {"eval_every": 2, "eval_steps": 1}
    with pytest.raises(DeviceError, match="No space left"):
        go(asked, on_step)
    assert read_best(run).step == -1 and left(run) == [4]


def test_an_export_on_the_way_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbx.live import save

    run, room = tmp_path / "run", save.check_free_space

    def on_step(step: Step) -> None:
        monkeypatch.setattr(save, "check_free_space", full if step.step == 2 else room)

    go(recipe(run, 4, save_every=0, export_every=2), on_step)
    assert lost(run) == ["export/step_0000002"]
    assert [path.name for path in (run / "export").iterdir()] == ["step_0000004"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_rank_that_cannot_write_leaves_no_other_waiting(tmp_path: Path) -> None:
    """Every place on the main rank, those of all ranks on the other one; run.timeout_s would end the run."""
    faults = [*((0, place) for place in places()), *((1, place) for place in EVERYWHERE)]
    by_step = {2 * number + 2: fault for number, fault in enumerate(faults)}
    asked = recipe(tmp_path / "run", 2 * len(faults) + 1, timeout_s=30)
    asked["parallel"] = {"tp": 2}
    run_world(2, [{"recipe": asked, "faults": by_step}], tmp_path / "losses.json")
    assert lost(tmp_path / "run") == [f"iter_{step:07d}" for step in by_step]
    named_last = 2 * len(places())  # whole, but for the tracker
    saved = [step for step in range(1, 2 * len(faults) + 2) if step not in by_step or step == named_last]
    assert left(tmp_path / "run") == saved
