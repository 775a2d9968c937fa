"""A copy of the packages and their import contracts, to plant something in and lint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copied(folder: Path) -> Path:
    """`folder`, with the packages and pyproject.toml in it."""
    folder.mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in ("mbx", "converters", "mappings"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def lint(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the contracts there."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
