"""Runs a command line in this process, as the console script would, and reads what it said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mbx.cli import main

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"


@dataclass(frozen=True, slots=True)
class Said:
    """Exit code and both streams of one run."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout; fails for anything before or behind it."""
        loaded = json.loads(self.stdout)
        assert isinstance(loaded, dict)
        return loaded


Run = Callable[..., Said]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs `mbx` with the arguments given."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


def assert_nothing_left(target: Path) -> None:
    """No target, and none of the names a run works under."""
    left = [path.name for path in target.parent.iterdir() if path.name.startswith(target.name)]
    assert left == []
