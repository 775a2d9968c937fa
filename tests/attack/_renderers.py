"""Renderers of chat templates that are forked, not started: what each one imports would be most of an attack's time.

What it answers and its limits are those of `mbx.train.data.template_process`; `test_templates.py` has started ones.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import IO

from mbx.train.data import template_process


class Forked:
    """As much of a `subprocess.Popen` as the template's owner uses."""

    def __init__(self) -> None:
        question_end, question = os.pipe()
        answer, answer_end = os.pipe()
        self._child = os.fork()
        if not self._child:
            _serve(question_end, answer_end, (question, answer))
        os.close(question_end)
        os.close(answer_end)
        self.stdin: IO[bytes] = os.fdopen(question, "wb")
        self.stdout: IO[bytes] = os.fdopen(answer, "rb", buffering=0)

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    def communicate(self) -> None:
        os.waitpid(self._child, 0)
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a question that nobody read
            self.stdin.close()


def _serve(questions: int, answers: int, others: tuple[int, int]) -> None:
    """The child: it must end here, whatever happens."""
    try:
        for other in others:
            os.close(other)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        with os.fdopen(questions, "rb") as asked, os.fdopen(answers, "wb") as answered:
            template_process._serve(asked, answered)
    finally:
        os._exit(0)
