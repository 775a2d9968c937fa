"""Processes that begin with the model libraries imported.

A rank of a test's job needs torch, Megatron Core and Transformers, whose import takes five seconds of a core: as long
as most jobs. So a parent imports them once, and each rank is a fork of it. Neighbouring ranks come from two parents,
which draw hash seeds of their own as processes of a real job do: ranks that walk a set in unequal orders are found.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
_LIBRARIES = (
    "torch.distributed.checkpoint",
    "transformers.modeling_utils",
    "mbx.train.run.loop",
    "mbx.train.run.prepare",
    "mbx.train.proof.training",
    "mbx.live",
)


class _Parent:
    """The process that forks, from here: what it is asked goes down its input, what became of its forks comes back."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends the tests, and they close its input
        )
        self.codes: dict[int, int] = {}
        atexit.register(self.close)

    def close(self) -> None:
        """End it, and what it forked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def fork(self, request: dict[str, Any]) -> int:
        """The process id of a fork that carries out `request`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while (said := self._hear())["code"] is not None:
            pass
        return said["pid"]

    def code(self, pid: int) -> int | None:
        """The exit code of a fork, None while it runs."""
        while pid not in self.codes and select.select([self.process.stdout], [], [], 0)[0]:
            self._hear()
        return self.codes.get(pid)

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said = json.loads(os.read(self.process.stdout.fileno(), _LINE))
        if said["code"] is not None:
            self.codes[said["pid"]] = said["code"]
        return said


#: Bytes of everything that a parent says: a read takes one message, whole, and no other.
_LINE = 64


@cache
def _parent(number: int) -> _Parent:
    return _Parent()


@dataclass
class Fork:
    """As much of a `subprocess.Popen` as tests of jobs use."""

    pid: int
    _parent: _Parent = field(repr=False)

    def poll(self) -> int | None:
        return self._parent.code(self.pid)

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start(
    rank: int,
    script: Path,
    *arguments: object,
    log: Path,
    own_group: bool = False,
    python: str = sys.executable,
    **variables: str,
) -> Fork | subprocess.Popen[bytes]:
    """Start `script` as the rank of that number, in the root of the repository; all that it prints goes to `log`.

    `variables` are added to the environment; `own_group`: it leads a process group, by which what it forks is found;
    `python`: another interpreter, which starts afresh.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables
    words = [str(script), *map(str, arguments)]
    if python != sys.executable or not hasattr(os, "pidfd_open"):  # which Linux has
        with log.open("wb") as printed:
            return subprocess.Popen(
                [python, *words],
                env=environment,
                cwd=ROOT,
                stdout=printed,
                stderr=printed,
                start_new_session=own_group,
            )
    parent = _parent(rank % 2)
    return Fork(parent.fork({"argv": words, "env": environment, "log": str(log), "own_group": own_group}), parent)


def meet(rank: int, note: Path) -> TCPStore | None:
    """Where the ranks of a world find each other: a port that rank 0 takes, keeps open and writes down in `note`.

    A port that is looked up, closed and opened again later may be another process's by then. The result must live
    until the process group is gone. Torch joins a store at MASTER_PORT, as torchrun's workers do, where the
    environment says that another opened it.
    """
    from torch.distributed import TCPStore

    store = None
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        draft = note.with_name(f"{note.name}.tmp")
        draft.write_text(str(store.port))
        draft.replace(note)
    deadline = time.monotonic() + 300
    while not note.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": note.read_text(), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store


def serve() -> dict[str, Any] | None:
    """Fork for each request on the input, until it is closed. The request in a fork, None in the parent."""
    running: dict[int, int] = {}  # a descriptor that is ready when the process has ended → its id
    while True:
        for ready in select.select([0, *running], [], [])[0]:
            if ready:
                pid = running.pop(ready)
                os.close(ready)
                _say(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            elif not (line := sys.stdin.readline()):
                for pid in running.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            elif pid := os.fork():
                running[os.pidfd_open(pid)] = pid
                _say(pid, None)
            else:
                for descriptor in running:
                    os.close(descriptor)
                return json.loads(line)


def _say(pid: int, code: int | None) -> None:
    os.write(1, json.dumps({"pid": pid, "code": code}).ljust(_LINE).encode())


def become(argv: list[str], env: Mapping[str, str], log: str, own_group: bool) -> None:
    """Be `python argv…` from here on."""
    import numpy as np

    if own_group:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    nothing, printed = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for here, there in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(here, there)
    np.random.seed()  # the parent's, in every fork
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    for library in _LIBRARIES:
        import_module(library)
    if (request := serve()) is not None:
        become(**request)
