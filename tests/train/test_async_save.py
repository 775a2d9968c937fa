"""Checkpoints written beside the training: as exact as others, and never half of one under the tracker."""

from __future__ import annotations

from pathlib import Path

import pytest
from _trainings import Raw, raw, run_here, run_to_its_kill, start_world

from mbx.train.checkpoints.state import latest


def recipe(run_dir: Path, **run: object) -> Raw:
    return raw(
        run_dir,
        train={"steps": 8, "deterministic": True, "micro_batch": 2, "global_batch": 4},
        model={"config": {"attention_dropout": 0.1, "hidden_dropout": 0.1}},
        run={"save_every": 2, "save_async": True, **run},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the same run without asynchronous saving."""
    return run_here(recipe(tmp_path_factory.mktemp("whole") / "run", save_async=False))


@pytest.mark.slow
def test_a_stopped_run_resumes(tmp_path: Path, whole: list[float]) -> None:
    run = tmp_path / "run"
    (stopped,) = start_world(1, [{"recipe": recipe(run), "stop_at": 5}], tmp_path / "first.json")
    assert stopped.wait(timeout=120) == 0
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert run_here(recipe(run), resume=True) == whole[5:]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert sorted(p.name for p in run.glob("iter_*")) == ["iter_0000006", "iter_0000008"], "run.keep is 2"


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path, whole: list[float]) -> None:
    """The writer of step 6 hangs; the process dies at step 7, with half a checkpoint on the disk."""
    run = tmp_path / "run"
    run_to_its_kill({"recipe": recipe(run), "stall_from": 5, "kill_at": 7}, tmp_path / "first.json")
    assert list(run.glob("iter_0000006.*"))
    found = latest(run)
    assert found is not None and found.name == "iter_0000004"
    assert run_here(recipe(run), resume=True) == whole[4:]
