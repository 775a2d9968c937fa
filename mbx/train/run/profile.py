"""A trace of some steps, and on a GPU the memory of them, for whoever asks where the time or the memory goes."""

from __future__ import annotations

from pathlib import Path

import torch

from mbx.train.run.log import PROFILE, Log
from mbx.untrusted.names import writable

#: Steps of a start that are not traced: kernels are compiled, and a graph is recorded.
_AFTER = 5
#: Allocations that are remembered, the last ones; a step of a large model is some ten thousand.
_EVENTS = 200_000


class Profile:
    """Traces `steps` steps of one process, behind the first five of this start; `step` is called behind each."""

    def __init__(self, steps: int, run_dir: Path, log: Log, *, cuda: bool) -> None:
        self.steps, self.run_dir, self.log, self.cuda = steps, run_dir, log, cuda
        self._seen = 0
        self._trace: torch.profiler.profile | None = None

    def step(self, number: int) -> None:
        """Begin or end, behind step `number` of the run."""
        self._seen += 1
        if self.steps and self._seen == _AFTER:
            self._begin()
        elif self._trace is not None and self._seen == _AFTER + self.steps:
            self._end(f"steps {number - self.steps + 1} to {number}")

    def close(self) -> None:
        """End what a stopped run leaves open; say so where it never began."""
        if self._trace is not None:
            self._end(f"{self._seen - _AFTER} steps of {self.steps}")
        elif self.steps and self._seen < _AFTER:
            self.log.message(f"run.profile traces nothing: it begins behind {_AFTER} steps")

    def _begin(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        self._trace = torch.profiler.profile(activities=kinds)
        self._trace.start()

    def _end(self, what: str) -> None:
        assert self._trace is not None
        self._trace.stop()
        try:
            self._write(what, self._trace)
        except (OSError, RuntimeError) as error:
            self.log.message(f"the profile could not be written: {error}; the run goes on")
        self._trace = None

    def _write(self, what: str, traced: torch.profiler.profile) -> None:
        folder = writable(self.run_dir, PROFILE)
        folder.mkdir(exist_ok=True)
        trace = writable(folder, "trace.json.gz")
        trace.unlink(missing_ok=True)
        traced.export_chrome_trace(str(trace))
        self.log.message(f"{what} are traced in {trace}; ui.perfetto.dev opens it")
        if self.cuda:
            memory = writable(folder, "memory.pickle")
            torch.cuda.memory._dump_snapshot(str(memory))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            self.log.message(f"every allocation of them is in {memory}; pytorch.org/memory_viz draws it")
