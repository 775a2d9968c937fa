"""Steps that are traced on request, and what a run says where it is too short for it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from _trainings import raw, run_here

from mbx.train.run.report import write_report


def test_steps_behind_the_first_five_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run_here(raw(run, train={"steps": 8}, run={"profile": 2, "save": False}))
    assert "steps 6 to 7 are traced in" in capsys.readouterr().err
    with gzip.open(run / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    products = [event for event in events if event.get("name") in ("aten::mm", "aten::addmm", "aten::linear")]
    assert len(products) > 10
    assert "profile/trace.json.gz" in write_report(run).read_text()


def test_a_run_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(raw(tmp_path / "run", train={"steps": 2}, run={"profile": 2, "save": False}))
    assert "run.profile traces nothing: it begins behind 5 steps" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_a_run_that_ends_within_its_trace_keeps_what_there_is(tmp_path: Path) -> None:
    run_here(raw(tmp_path / "run", train={"steps": 6}, run={"profile": 9, "save": False}))
    assert (tmp_path / "run" / "profile" / "trace.json.gz").stat().st_size > 1000
