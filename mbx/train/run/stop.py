"""Stopping a run: a signal ends the step and saves, a second Ctrl-C ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TypeAlias

_Handler: TypeAlias = object


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Notes SIGTERM and SIGINT instead of dying of them, so that a step ends and a checkpoint is written.

    `asked`: the name of the first such signal, empty before. A second SIGINT raises KeyboardInterrupt. torchrun passes
    its own signals on to the ranks, and ends them 30 seconds later.
    """

    def __init__(self, speaks: bool) -> None:
        self.asked = ""
        self._speaks = speaks
        self._before: dict[int, _Handler] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a writer of a checkpoint, which a Ctrl-C reaches as well: it finishes
        if self.asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if self._speaks and not self.asked:
            # os.write: a handler may interrupt a write to sys.stderr
            os.write(2, b"\nending this step, then saving; Ctrl-C once more aborts without\n")
        self.asked = self.asked or signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
