"""Conversions in forked processes that are killed, or made to fail, at a chosen system call."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters.layout import Layout
from mbx.convert import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

#: Everything that changes a file system on mbx's way to a target.
CALLS = ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir")


def convert(direction: str, source: Path, target: Path, **options: Any) -> None:
    """A conversion with small memory, so that even a tiny model has many pieces."""
    settings = Options(**{"workers": 2, "max_memory": 1 << 24, **options})
    plan = plan_hf_to_mcore if direction == "hf-to-mcore" else plan_mcore_to_hf
    run(plan(source, target, settings))


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, but for the manifest's note of where the source lay."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "mbx_manifest.json":
                data = json.dumps({k: v for k, v in json.loads(data).items() if k != "source"}).encode()
            out[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return out


def in_child(action: Callable[[], object]) -> tuple[int, str]:
    """Run `action` in a forked process: its wait status, and what it returned, as text."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside threads; the child uses none of them
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            text = str(action())
            os.write(writing, text.encode()[:60000])
            status = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode()[:60000])
        finally:
            os._exit(status)
    os.close(writing)
    text = b""
    while block := os.read(reading, 1 << 16):
        text += block
    os.close(reading)
    return os.waitpid(pid, 0)[1], text.decode()


def dying_at(count: int, action: Callable[[], object]) -> Callable[[], int]:
    """`action` that ends by SIGKILL at the `count`-th changing system call, half of whose bytes are written.

    Returns the number of calls where it gets to its end.
    """

    def run_and_die() -> int:
        calls = 0

        def wrap(name: str) -> None:
            real = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == count:
                    if name in ("pwrite", "write"):
                        real(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
                # A killed process loses no pages, flushed or not: the flush itself would only cost time.
                return None if name == "fsync" else real(*args, **kwargs)

            setattr(os, name, call)

        for name in CALLS:
            wrap(name)
        action()
        return calls

    return run_and_die


__all__ = ["CALLS", "Layout", "convert", "dying_at", "in_child", "tree"]
