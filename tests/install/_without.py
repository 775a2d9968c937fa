"""A Python that has mbx's core alone: the model libraries cannot be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: Run before anything else by an interpreter that finds it on its path.
_SITE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def without(folder: Path, *hidden: str) -> dict[str, str]:
    """An environment in which a Python finds no package `hidden`; `folder` holds what does it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE.format(hidden=set(hidden)))
    return {**os.environ, "PYTHONPATH": str(folder), "MBX_NO_CONFIG": "1", "COLUMNS": "200"}


#: Runs commands one after the other until one fails.
_RUNS = """
import json, sys
from mbx.cli import main

for command in json.loads(sys.argv[1]):
    if code := main(command):
        sys.exit(f"{command}: {code}")
"""


def run_all(environment: dict[str, str], *commands: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Command lines in one process of this Python, which costs one start; its code is 0 where all of theirs are."""
    return run_all_by(sys.executable, environment, *commands, cwd=cwd)


def run_all_by(
    python: str, environment: dict[str, str], *commands: Sequence[object], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """The same by another interpreter."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    run = [python, "-c", _RUNS, words]
    return subprocess.run(run, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def mbx(environment: dict[str, str], *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m mbx`, run to its end."""
    command = [sys.executable, "-m", "mbx", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
