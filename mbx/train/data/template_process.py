"""Chat templates in a process of their own, where the program that a template is can neither hang nor fill this one.

Jinja's sandbox keeps a template from files and attributes, but not from loops in loops, `9 ** 9 ** 9` or padding of a
gigabyte; counting steps would miss what runs in C. So a process renders one conversation after another, with little
memory to have, and is ended where one takes long.
"""

from __future__ import annotations

import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from converters.errors import UsageError
from mbx.train.data.calls import forms
from mbx.train.data.turns import (
    NO_MARKS,
    Marks,
    Messages,
    RefusedError,
    Render,
    Rendered,
    check_said,
    find_turns,
    span_of_generation,
)

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
    """A tokenizer's chat template, in a process that starts with the first question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "", marks: Marks = NO_MARKS) -> None:
        self._settings = {
            "template": template or tokenizer.get_chat_template(),
            "tokens": tokenizer.special_tokens_map,
            "special": marks.special,
            "stops": marks.stops,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._names: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Every name that the template reads from anything: what keys of a message may mean something to it."""
        self._open()
        return self._names

    def turns(
        self, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object], wanted: Sequence[int]
    ) -> Rendered:
        """The conversation as text, and where in it the turns `wanted` lie; UsageError where the template
        refuses it, takes too long or too much memory.

        `variables`: what the template reads beside the messages: `tools`, and its own switches.
        """
        self._open()
        answer = self._ask({"messages": messages, "variables": variables, "wanted": wanted}, SECONDS)
        return Rendered(answer["text"], tuple((one, two) for one, two in answer["spans"]), answer["rewritten"])

    def _open(self) -> None:
        if self._process is None:
            self._process = _start()
            self._names = frozenset(self._ask(self._settings, _START_SECONDS)["names"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _ask(self, question: object, seconds: float) -> dict[str, Any]:
        """Send a line, and get its answer."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            # It reads a question whole before it answers, so that neither side waits for the other to read.
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(_line(self._process.stdout, seconds))
        except (OSError, ValueError) as error:  # TimeoutError too
            self.close()
            raise UsageError(f"the chat template was not done with this conversation: {error}") from error
        if "refused" in answer:
            raise UsageError(f"the chat template refuses this conversation: {answer['refused']}")
        if "lost" in answer:
            raise UsageError(answer["lost"])
        return answer


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
    import transformers.utils.chat_template_utils  # noqa: F401  before memory is limited

    settings = json.loads(questions.readline())
    _limit()
    _answer(answers, named := _guarded(lambda: {"names": sorted(_names(settings["template"]))}))
    settings["names"] = named.get("names", [])
    for line in questions:
        _answer(answers, _guarded(lambda: _rendered(settings, json.loads(line))))  # noqa: B023  called at once


def _guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` answers, or why it does not."""
    # Nobody handles this signal, so it ends even what runs in C, and this process where its parent is gone.
    signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
    try:
        answer = work()
        if len(text := answer.get("text", "")) > MOST_TEXT:
            answer = {"refused": f"it makes {len(text)} characters of it"}
    except MemoryError:
        answer = {"refused": f"it takes more than {MEMORY >> 20} MiB"}
    except _LostError as error:
        answer = {"lost": f"{error}"[:1000]}
    except Exception as error:  # a template is a program: jinja2 raises what the template says
        answer = {"refused": f"{error or type(error).__name__}"[:1000]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    return answer


class _LostError(Exception):
    """The template renders the conversation, and a turn is not to be found in it."""


def _names(template: str) -> set[str]:
    """Names of the attributes and items that a template reads."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    parsed = _compile_jinja_template(template).environment.parse(template)
    read = {node.attr for node in parsed.find_all(nodes.Getattr)}
    return read | {c.value for c in parsed.find_all(nodes.Const) if isinstance(c.value, str)}


def _rendered(settings: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {**settings["tokens"], **question.get("variables", {})}

    def draw(messages: Sequence[Mapping[str, object]], prompt: bool, spans: bool = False) -> Any:
        return render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=settings["template"],
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **variables,
        )

    def render(messages: Sequence[Mapping[str, object]], prompt: bool) -> str:
        try:
            text = str(draw(messages, prompt)[0][0])
        except Exception as error:  # as above
            if isinstance(error, MemoryError):
                raise
            raise RefusedError(f"{error or type(error).__name__}") from error
        if len(text) > MOST_TEXT:
            raise RefusedError(f"it makes {len(text)} characters of it")
        return text

    messages, text = _taken(render, question["messages"])
    wanted = question.get("wanted")
    if not wanted:
        return {"text": text, "spans": [], "rewritten": False}
    marks = Marks(tuple(settings["special"]), tuple(settings["stops"]))
    try:
        check_said(render, messages, wanted, frozenset(settings["names"]))
    except RefusedError as error:
        raise _LostError(str(error)) from error
    if re.search(r"{%-?\s*generation\s*-?%}", settings["template"]):
        found = [span_of_generation(text, one, two, marks) for one, two in draw(messages, False, True)[1][0]]
        turns = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(found) != len(turns):
            raise _LostError(f"the template's {{% generation %}} marks {len(found)} parts of {len(turns)} turns")
        return {"text": text, "spans": [found[turns.index(at)] for at in wanted], "rewritten": False}
    try:
        done = find_turns(render, messages, wanted, marks)
    except RefusedError as error:
        raise _LostError(str(error)) from error
    return {"text": done.text, "spans": done.spans, "rewritten": done.rewritten}


def _taken(render: Render, messages: Messages) -> tuple[Messages, str]:
    """The conversation in the first form that the template takes, and its text; RefusedError where it takes none."""
    refused: RefusedError | None = None
    for form in forms(messages):
        try:
            return form, render(form, False)
        except RefusedError as error:
            refused = refused or error
    assert refused is not None
    raise refused


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
