"""Conversions in processes of their own that are killed, or made to fail, at a chosen system call."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from converters.mcore.layout import Layout
from mbx.run.job import Options, Outcome, plan_hf_to_mcore, plan_mcore_to_hf, run

#: Everything that changes a file system on mbx's way to a target.
CALLS = ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir")


def convert(direction: str, source: Path, target: Path, **options: Any) -> Outcome:
    """A conversion with small memory, so that even a tiny model has many pieces."""
    settings = Options(**{"workers": 2, "max_memory": 1 << 24, **options})
    plan = plan_hf_to_mcore if direction == "hf-to-mcore" else plan_mcore_to_hf
    return run(plan(source, target, settings))


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


#: Forks of a process that has no threads. A fork of the tests' own hangs for ever in its first parallel sum where
#: torch has started threads before it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["mbx.run.job", "mbx.run.merge", "mbx.cli", "mbx.cli.adapter", "mbx.cli.merge", "torch", "tests.formats._runs"]
)


def in_child(action: Callable[[], object], timeout: float = 120) -> tuple[int, str]:
    """Run `action`, which must pickle, in a process of its own: its exit code, -N after signal N, and its result.

    The result is text; what was raised, where something was. TimeoutError after `timeout` seconds.
    """
    reading, writing = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=_report, args=(action, writing))
    child.start()
    writing.close()
    try:
        text = str(reading.recv()) if reading.poll(timeout) else ""
    except EOFError:  # it died
        text = ""
    reading.close()
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"{action} was not done in {timeout:g} s")
    return child.exitcode, text


def _report(action: Callable[[], object], writing: Connection) -> None:
    try:
        writing.send(str(action()))
    except BaseException as error:
        writing.send(f"{type(error).__name__}: {error}")
        os._exit(1)


def dying_at(count: int, action: Callable[[], object]) -> Callable[[], int]:
    """`action` that ends by SIGKILL at the `count`-th changing system call, half of whose bytes are written.

    Returns the number of calls where it gets to its end. For `in_child` alone: the calls stay replaced.
    """
    return partial(_run_and_die, count, action)


def _run_and_die(count: int, action: Callable[[], object]) -> int:
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


__all__ = ["CALLS", "Layout", "convert", "dying_at", "in_child", "tree"]
