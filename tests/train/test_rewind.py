"""A loss that leaves what it was: the run goes back to its last checkpoint, past the batches that led there."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from _trainings import Raw, raw

from converters.errors import DifferenceError, UsageError
from mbx.formats.torch_dist import TRACKER
from mbx.train.checkpoints.state import STATE, LoopState, latest
from mbx.train.data.rows import Pattern, Row
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.dataset import Dataset
from mbx.train.run.hooks import Hooks
from mbx.train.run.log import METRICS, Step
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare
from mbx.train.run.report import write_report
from mbx.train.run.rewind import Rewind

STEPS, GLOBAL, MARK = 18, 4, 7
BAD = (12, 13)


@dataclasses.dataclass(frozen=True)
class Marked:
    """Counting rows; those of some batches have one label throughout, by which a loss knows them."""

    rows: Pattern
    bad: tuple[int, ...]

    def row(self, index: int) -> Row:
        row = self.rows.row(index)
        marks = np.full_like(row.labels, MARK)
        return dataclasses.replace(row, labels=marks) if index // GLOBAL in self.bad else row


def recipe(run: Path, **train_keys: object) -> Raw:
    keys: dict[str, object] = {"rewind": 2, "rewind_steps": 1, **train_keys}
    sizes: dict[str, object] = {"steps": STEPS, "micro_batch": 2, "global_batch": GLOBAL, "deterministic": True}
    drawn = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    return raw(run, model={"config": drawn}, train=sizes | keys, run={"save_every": 3, "keep": 0})


def go(
    asked: Raw, bad: tuple[int, ...] = BAD, *, times: float = 4.0, resume: bool = False, stop: int = -1
) -> list[float]:
    """A run whose batches of these numbers have so many times their loss; it ends within step `stop`."""

    def spiking(losses: torch.Tensor, batch: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        labels = batch["labels"]
        assert labels is not None
        return losses * torch.where((labels == MARK).all(1, keepdim=True), times, 1.0)

    prepared = prepare(parse_recipe(asked), resume=resume, hooks=Hooks(token_losses=spiking))
    rows = prepared.data.train
    assert isinstance(rows, Pattern)
    prepared = dataclasses.replace(prepared, data=Dataset(Marked(rows, bad)))

    def on_step(step: Step) -> None:
        if step.step == stop:
            raise KeyboardInterrupt

    return list(train(prepared, live=False, on_step=on_step).losses)


def rewinds(run: Path) -> list[tuple[int, int]]:
    records = map(json.loads, (run / METRICS).read_text().splitlines())
    return [(record["step"], record["to"]) for record in records if record["kind"] == "rewind"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run that met two bad batches, and its losses."""
    folder = tmp_path_factory.mktemp("rewound") / "run"
    return folder, go(recipe(folder))


def test_it_goes_back_and_the_data_moves_on(run: tuple[Path, list[float]], tmp_path: Path) -> None:
    """As a run does that is resumed there by hand, with rows that begin behind what was passed over."""
    folder, losses = run
    assert rewinds(folder) == [(13, 12), (13, 12)] and len(losses) == STEPS
    assert max(losses) < 2 * np.median(losses)
    state = json.loads((folder / f"iter_{STEPS:07d}" / STATE).read_text())
    assert (state["rewinds"], state["skipped"]) == (2, 2)
    copy = tmp_path / "run"
    shutil.copytree(folder / "iter_0000012", copy / "iter_0000012")
    (copy / TRACKER).write_text("12")
    by_hand = json.loads((copy / "iter_0000012" / STATE).read_text()) | {"skipped": 2, "rewinds": 2}
    (copy / "iter_0000012" / STATE).write_text(json.dumps(by_hand))
    assert go(recipe(copy), resume=True) == losses[12:]
    assert "Step 13: the loss" in write_report(folder).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [13, 17])
def test_resuming_goes_the_same_way(run: tuple[Path, list[float]], tmp_path: Path, stop: int) -> None:
    """Ended within the spike, where it is met again, and behind it, where the checkpoint says what was passed over."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(recipe(folder), stop=stop)
    saved = latest(folder)
    assert saved == folder / ("iter_0000012" if stop == 13 else "iter_0000015")
    assert go(recipe(folder), resume=True) == run[1][int(saved.name[-2:]) :]


@pytest.mark.slow
def test_several_steps_in_a_row_and_losses_that_are_no_number(tmp_path: Path) -> None:
    """Nothing is saved in between, though a checkpoint would be due."""
    losses = go(recipe(tmp_path / "run", rewind_steps=3), (13, 14, 15), times=math.nan)
    assert rewinds(tmp_path / "run") == [(16, 12)] and len(losses) == STEPS and all(map(math.isfinite, losses))


@pytest.mark.slow
def test_it_goes_back_so_often_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(
        DifferenceError, match=r"step 13: the loss .* is more than train.rewind_factor .* went back 1 "
    ):
        go(recipe(tmp_path / "run", rewind=1))
    assert latest(tmp_path / "run") == tmp_path / "run" / "iter_0000012"


def test_before_the_first_checkpoint_there_is_nowhere_to_go(tmp_path: Path) -> None:
    with pytest.raises(DifferenceError, match="no checkpoint to go back to"):
        go(recipe(tmp_path / "run"), (0,), times=math.nan)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "run")
    for key in ("save_every", "save", "save_optimizer"):
        with pytest.raises(UsageError, match="it saves none"):
            prepare(parse_recipe(asked | {"run": {**asked["run"], key: 0 if key == "save_every" else False}}))


def test_a_loss_is_judged_by_the_median_of_good_ones(tmp_path: Path) -> None:
    judge = Rewind(parse_recipe(recipe(tmp_path, rewind_factor=2.0)), None)
    assert [bool(judge.why(loss)) for loss in (5.0, 20.0, *[1.0] * 9)] == [False] * 11  # the first tell nothing
    assert [bool(judge.why(loss)) for loss in (2.0, 2.1, 1.9, math.inf, 2.1)] == [False, True, False, True, True]
    kept = judge.into(LoopState(0, 0.0, "", 1, "", 0))
    assert kept.recent == (5.0, 20.0, *[1.0] * 9, 2.0, 1.9)
