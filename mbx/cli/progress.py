"""Progress of a run in bytes: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import resource
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mbx.cli.output import out
from mbx.text import human_bytes, human_memory, human_time, screen_width

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 5.0
#: Columns from which all figures stand beside the bar.
_ROOMY = 76


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes; the interpreter and its libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """`with Meter("writing", total_bytes) as meter:` call `meter.advance(n)` from any thread.

    Draws nothing where `out` shows no progress. `total` may be None where it is not known.
    """

    def __init__(self, what: str, total: int | None, *, every_s: float = LINE_EVERY_S) -> None:
        self.what, self.total, self.every_s = what, total, every_s
        self.done = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._lines: threading.Thread | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, nbytes: int) -> None:
        """Note `nbytes` more."""
        with self._lock:
            self.done += nbytes

    def expect(self, nbytes: int) -> None:
        """Note `nbytes` more to come."""
        with self._lock:
            self.total = (self.total or 0) + nbytes

    def reach(self, done: int, total: int) -> None:
        """Note that `done` of `total` bytes are there, however many were noted before."""
        with self._lock:
            self.done, self.total = done, total

    def __enter__(self) -> Meter:
        self._started = time.monotonic()
        if out.shows_progress:
            if sys.stderr.isatty():
                self._start_bar()
            self._lines = threading.Thread(target=self._tick, name="mbx-progress", daemon=True)
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._lines is not None:
            self._lines.join()
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def line(self) -> str:
        """Where the run stands, in words."""
        if self.total and self.done >= self.total:  # models are run, files flushed
            done = f"{self.what}: all {human_bytes(self.total)} done, still at work"
            return f"{done}, peak memory {human_memory(peak_memory_bytes())}"
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        done, left, rate, peak = self._figures()
        return f"{self.what}: {', '.join(filter(None, (done + share, left, rate, f'peak memory {peak}')))}"

    def _figures(self) -> tuple[str, str, str, str]:
        """How much is done, how long the rest will take as fast as that, how fast it was, and the peak of memory."""
        rate = self.done / max(time.monotonic() - self._started, 1e-9)
        done = human_bytes(self.done) + (f" of {human_bytes(self.total)}" if self.total else "")
        left = f"{human_time(max(0, self.total - self.done) / rate)} left" if self.total and rate else ""
        return done, left, f"{rate / 1e9:.2f} GB/s", human_memory(peak_memory_bytes())

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12 if screen_width() < _ROOMY else 24),
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True)),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self.what, total=self.total, said="")
        self._bar.start()

    def _tick(self) -> None:
        """Redraw the bar ten times a second, or say a line every `every_s`."""
        while not self._stop.wait(0.1 if self._bar is not None else self.every_s):
            if self._bar is not None:
                self._draw()
            else:
                out.message(self.line())

    def _draw(self) -> None:
        if self._bar is None or self._task is None:
            return
        done, left, rate, peak = self._figures()
        figures = (done, left) if screen_width() < _ROOMY else (done, left, rate, peak)
        self._bar.update(self._task, completed=self.done, total=self.total, said="  ".join(filter(None, figures)))
