"""A worker whose readers do what the watch must see: each fault is a target, sound until an input is changed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.attack import _worker
from tests.attack._targets import TARGETS, Target


def _hang(folder: Path) -> None:
    while True:
        pass


def _import(folder: Path) -> None:
    (folder / "stranger.py").write_text("x = 1\n")
    sys.path.insert(0, str(folder))
    __import__("stranger")


def _grow(folder: Path) -> None:
    bytearray(2 << 30)


def _raise(folder: Path) -> None:
    raise ValueError("not an MbxError")


FAULTS: dict[str, Callable[[Path], object]] = {
    "write": lambda folder: (folder.parents[1] / "outside" / "canary").write_text("x"),
    "make": lambda folder: (folder.parents[1] / "beside").mkdir(),
    "hang": _hang,
    "grow": _grow,
    "import": _import,
    "start": lambda folder: subprocess.run(["true"]),
    "system": lambda folder: os.system("true"),
    "socket": lambda folder: socket.socket().close(),
    "raise": _raise,
    "die": lambda folder: os._exit(3),
}


def _only_when_changed(fault: Callable[[Path], object]) -> Callable[[Path, Path], Iterator[Callable[[], object]]]:
    seen: list[Path] = []

    def calls(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
        seen.append(folder)
        yield lambda: fault(folder) if len(seen) > 1 else None

    return calls


if __name__ == "__main__":
    _worker.SECONDS = 1
    TARGETS.update({name: Target("hf", ("config.json",), _only_when_changed(fault)) for name, fault in FAULTS.items()})
    _worker.main(*_worker.asked())
