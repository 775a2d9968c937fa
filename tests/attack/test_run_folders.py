"""Run folders with links in the way of what a run writes: nothing outside them is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import StorageError
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.log import METRICS, Log
from mbx.train.run.report import write_report


def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("precious\nwithout an end")
    return path


def test_metrics_are_not_written_through_a_link(tmp_path: Path) -> None:
    recipe = load_recipe("deepseek_v2_lite_lora", [f"run.dir={tmp_path / 'run'}"])
    recipe.run_dir.mkdir()
    (recipe.run_dir / METRICS).symlink_to(path := precious(tmp_path))
    with pytest.raises(StorageError, match="link"):
        Log(recipe, main=True, live=False)
    assert path.read_text() == "precious\nwithout an end"


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / METRICS).write_text('{"kind":"step","step":1,"loss":1,"tokens_per_s":1,"memory_gib":1,"lr":1}\n')
    (run / "report.html").symlink_to(path := precious(tmp_path))
    with pytest.raises(StorageError, match="link"):
        write_report(run)
    assert path.read_text() == "precious\nwithout an end"
    assert write_report(run, run / "other.html").is_file()
