"""Chat templates in a process of their own, where the program that a template is can neither hang nor fill this one.

Jinja's sandbox keeps a template from files and attributes, but not from loops in loops, `9 ** 9 ** 9` or padding of a
gigabyte; counting steps would miss what runs in C. So a process renders one conversation after another, with little
memory to have, and is ended where one takes long.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from converters.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: For one conversation: a long one of a real template takes milliseconds, and a few MiB.
SECONDS = 5.0
MEMORY = 256 << 20
#: Characters of a rendering, far above any context length.
MOST_TEXT = 16 << 20
#: Starting a process and importing Transformers, on a busy machine.
_START_SECONDS = 120.0
_BLOCK = 1 << 20


class Template:
    """A tokenizer's chat template, in a process that starts with the first conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = {"template": tokenizer.get_chat_template(), "tokens": tokenizer.special_tokens_map}
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, turns: Sequence[Mapping[str, object]]) -> str:
        """The conversation as text; UsageError where the template refuses it, takes too long or too much memory."""
        if self._process is None:
            self._process = _start()
            self._ask(self._settings, _START_SECONDS)
        return self._ask(turns, SECONDS)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _ask(self, question: object, seconds: float) -> str:
        """Send a line, and get its answer."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            # It reads a question whole before it answers, so that neither side waits for the other to read.
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(_line(self._process.stdout, seconds))
        except (OSError, ValueError) as error:  # TimeoutError too
            self.close()
            raise UsageError(f"the chat template was not done with this conversation: {error}") from error
        if "text" not in answer:
            raise UsageError(f"the chat template refuses this conversation: {answer['refused']}")
        return str(answer["text"])


@contextlib.contextmanager
def opened(tokenizer: PreTrainedTokenizerBase) -> Iterator[Template]:
    """The tokenizer's template; its process ends with the context."""
    template = Template(tokenizer)
    try:
        yield template
    finally:
        template.close()


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mbx.train.data.template_process"]
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    # In `/`: `-m` looks for modules where it runs.
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment, cwd=os.sep)


def _line(stream: IO[bytes], seconds: float) -> bytes:
    """A whole line; TimeoutError where it is not there in time, ValueError where it is too long or the end came."""
    parts: list[bytes] = []
    size, end = 0, time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)
        while not parts or not parts[-1].endswith(b"\n"):
            if not ready.select(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"it took more than {seconds:g} s")
            parts.append(os.read(stream.fileno(), _BLOCK))
            size += len(parts[-1])
            if not parts[-1]:
                raise ValueError("its process ended, for want of memory perhaps")
            if size > 8 * MOST_TEXT:
                raise ValueError("it wrote without end")
    return b"".join(parts)


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer every line: the first names the template, each other is a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    settings = json.loads(questions.readline())
    _answer(answers, {"text": ""})
    _limit()
    for line in questions:
        # Nobody handles this signal, so it ends even what runs in C, and this process where its parent is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
        try:
            rendered = render_jinja_template(
                conversations=[json.loads(line)], chat_template=settings["template"], **settings["tokens"]
            )
            text = str(rendered[0][0])
            answer = (
                {"text": text} if len(text) <= MOST_TEXT else {"refused": f"it makes {len(text)} characters of it"}
            )
        except MemoryError:
            answer = {"refused": f"it takes more than {MEMORY >> 20} MiB"}
        except Exception as error:  # a template is a program: jinja2 raises what the template says
            answer = {"refused": f"{error or type(error).__name__}"[:1000]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(answers, answer)


def _limit() -> None:
    """Hold this process to the memory that it has, and MEMORY more."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(answers: IO[bytes], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
