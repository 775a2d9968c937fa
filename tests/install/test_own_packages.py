"""Another project's `converters` or `mappings` is named as such, wherever it lies; mbx's own costs nothing to find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(*path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", "import mbx"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["converters", "mappings"])
def test_one_that_lies_before_ours_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text('"""Of somebody else."""\n')
    said = imported(tmp_path, ROOT, cwd=tmp_path)
    assert said.returncode == 1
    assert f"`{name}` at {tmp_path / name / '__init__.py'} is another project's package" in said.stderr
    assert "environment of its own" in said.stderr


@pytest.mark.parametrize("name", ["converters", "mappings"])
def test_one_that_was_installed_over_ours_is_named(tmp_path: Path, name: str) -> None:
    for package in ("mbx", "converters", "mappings"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert imported(tmp_path, cwd=tmp_path).returncode == 0
    (tmp_path / name / "__init__.py").write_text('"""Of somebody else."""\n')
    assert f"`{name}` at" in imported(tmp_path, cwd=tmp_path).stderr
    shutil.rmtree(tmp_path / name)
    said = imported(tmp_path, cwd=tmp_path)
    assert said.returncode == 1 and name in said.stderr
