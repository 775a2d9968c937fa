"""A command line that is killed at a chosen change of the file system, in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mbx.cli import main

#: Events of `sys.addaudithook` that change a file system.
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def die_at(count: int, words: list[str], cwd: Path) -> int:
    """Run a command line, killed before the `count`-th change of the file system; returns the number of changes."""
    os.chdir(cwd)
    changes = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in _CHANGES and (not writes or str(arguments[0]).startswith(("/dev", "/proc"))):
            return
        changes += 1
        if changes == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.dont_write_bytecode = True
    sys.addaudithook(hook)
    assert main(words) == 0
    return changes
