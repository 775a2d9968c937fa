"""Signals: the first ends a step and saves, a second Ctrl-C aborts, and afterwards all is as it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from _trainings import raw, run_here

from mbx.train.checkpoints.state import latest
from mbx.train.run.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stop(False) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_aborts() -> None:
    with Stop(False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_it_says_what_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    with Stop(True):
        os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C once more aborts" in capfd.readouterr().err


def test_ctrl_c_saves_and_the_run_resumes(tmp_path: Path) -> None:
    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    def recipe(name: str) -> dict[str, dict[str, object]]:
        return raw(tmp_path / name, train={"steps": 5, "micro_batch": 2, "global_batch": 4, "deterministic": True})

    def interrupt(step: object) -> None:
        if getattr(step, "step", 0) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    done = train(prepare(parse_recipe(recipe("run"))), live=False, on_step=interrupt)
    assert done.stopped == "stopped by SIGINT"
    saved = latest(tmp_path / "run")
    assert saved is not None and saved.name == "iter_0000002"
    assert [*done.losses, *run_here(recipe("run"), resume=True)] == run_here(recipe("whole"))


def test_aborting_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C twice in one step: nothing is saved, and the tracker names nothing."""

    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    def twice(step: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(prepare(parse_recipe(raw(tmp_path / "run"))), live=False, on_step=twice)
    assert latest(tmp_path / "run") is None
