"""Megatron Core's save of a distributed checkpoint, in steps between which the ranks of a run can agree.

Some of what it does with files one rank does alone, between two exchanges of all: the common state, the index,
metadata.json. An error there would end that rank, and leave the others waiting for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

#: What a rank does with files by itself, by where Megatron Core calls it; a release may be without one.
_ALONE = (
    (serialization, "save_config"),
    (getattr(common, "TorchCommonSaveStrategy", None), "save_common"),
    (filesystem_async.FileSystemWriterAsync, "finish"),
)
#: What gives a writer the queue for its results; a release has one of the two.
_QUEUES = ("_get_write_results_queue", "get_write_results_queue")


#: The process whose forks are writers at the moment, 0 while it writes nothing.
_writing = 0
#: prctl's PR_SET_PDEATHSIG, of Linux.
_DIES_WITH_PARENT = 1


def _die_with_parent() -> None:
    """In a writer that was forked: end when the rank does, which may be killed and nobody waits for the rest then."""
    global _writing
    if not _writing or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != _writing:  # it has ended before
        os._exit(1)
    _writing = os.getpid()  # one that writes in several processes forks them


os.register_at_fork(after_in_child=_die_with_parent)


class Results:
    """What the process that writes tells the one that trains, without a third between them.

    Megatron Core has a manager of its own there, which takes seconds to start and outlives a rank that is killed.
    """

    def __init__(self) -> None:
        # in memory, and the same for whoever is forked
        descriptor = os.memfd_create("results") if hasattr(os, "memfd_create") else None
        self._file = tempfile.TemporaryFile() if descriptor is None else os.fdopen(descriptor, "w+b")  # noqa: SIM115

    def put(self, value: object) -> None:
        """Say this."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """What was said; queue.Empty where it was not, or not to its end."""
        try:
            self._file.seek(0)
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error


class Saving:
    """A checkpoint on its way to `folder`, which exists: planned when made, then written, then finished.

    Each of the three is collective but for `write`. None of them leaves the other ranks alone for an error with files
    of this rank's: `failed` has it, and the ranks are to agree on what becomes of the checkpoint.
    `how` are the arguments by which a release writes beside a run without further packages.
    """

    def __init__(self, content: dict[str, object], folder: str, how: Mapping[str, str]) -> None:
        self.failed: list[Exception] = []
        self._process: Any = None
        self._results: Results | None = None
        try:
            self._results = Results()
        except OSError as error:
            self.failed.append(error)
        with self._own_files():
            self._request: AsyncRequest = serialization.save(
                content, folder, ("torch_dist", 1), async_sharded_save=True, **how
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that this rank writes."""
        if self._request.async_fn is None:
            return 0
        return sum(tensor.nbytes for _, _, (_, tensors) in self._request.async_fn_args[1] for _, tensor in tensors)

    def write(self, *, beside: bool) -> None:
        """Write this rank's tensors; `beside`: a forked process does, which holds them as they are now."""
        global _writing
        request = self._request
        if request.async_fn is None:
            return
        _writing = os.getpid()
        try:
            rank, buckets, results = request.async_fn_args
            given = (rank, buckets if request.preload_fn is None else request.preload_fn(), results)
            if not beside:
                request.async_fn(*given, **request.async_fn_kwargs)
                return
            self._process = multiprocessing.get_context("fork").Process(
                target=request.async_fn, args=given, kwargs=request.async_fn_kwargs
            )
            collects = gc.isenabled()
            gc.disable()  # a fork that collects would free what is another process's on the GPU
            try:
                self._process.start()
            finally:
                if collects:
                    gc.enable()
        except Exception as error:
            self.failed.append(error)
        finally:
            _writing = 0

    @property
    def writes(self) -> bool:
        """Whether the process beside this one is still writing."""
        return self._process is not None and bool(self._process.is_alive())

    def finish(self) -> None:
        """Wait for what is written beside, and write the index of what all ranks wrote.

        torch's CheckpointException, on all ranks, where one's tensors were not written.
        """
        if self._process is not None and self._process.pid is not None:
            self._process.join()
        with self._own_files():
            for step in self._request.finalize_fns:
                step()

    @contextlib.contextmanager
    def _own_files(self) -> Iterator[None]:
        """Let this rank go on behind an error with files of its own, to where the others meet it.

        No rank makes the folder: where a mount is gone, it would lie below it.
        """

        def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                try:
                    return function(*given, **named)
                except (OSError, RuntimeError) as error:  # torch.save has no other for a full disk
                    self.failed.append(error)
                    return None

            return call

        listed = guarded(lambda folder: os.listdir(folder))  # looked up when it is called

        def entries(folder: Path) -> Iterator[Path]:
            return iter([folder / name for name in listed(folder) or ()])

        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(Path, "iterdir", entries))  # to see whether it is empty
            for owner, name in _ALONE:
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, guarded(getattr(owner, name))))
            for name in _QUEUES:
                if hasattr(filesystem_async, name):
                    stack.enter_context(patch.object(filesystem_async, name, lambda: self._results))
            writer = filesystem_async.FileSystemWriterAsync
            stack.enter_context(patch.object(writer, "prepare_local_plan", lambda _, plan: plan))
            yield
