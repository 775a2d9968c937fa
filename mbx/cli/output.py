"""The one way out: results go to stdout, messages and errors to stderr, and with `--json` one document to stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from converters.errors import MbxError, spelt
from mbx.text import printable, redacted, screen_width

_SHOWN_DETAILS = 10
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}
_PLAIN = {"→": "->", "↔": "<->", "…": "...", "≤": "<=", "×": "x", "Δ": "d", "–": "-", "✓": "+", "✗": "x"}
#: What `paint` coloured and nobody wrote yet: no other colour is let through.
_painted: Counter[str] = Counter()
_COLOURED = re.compile(rf"\x1b\[(?:{'|'.join(_COLOURS.values())})m.*?\x1b\[0m", re.S)

#: What `--json` prints: values that json.dumps takes.
Document = Mapping[str, object]


class Output:
    """Where a command's words go; one instance, `out`, serves the process.

    `verbosity`: 1 with -v, -1 with -q (no progress, no messages), -2 with -qq (no result either: only errors and
    the exit code).
    """

    def __init__(self) -> None:
        self.json = False
        self.verbosity = 0
        self._answered = False

    def reset(self, *, json: bool = False) -> None:
        """Forget an earlier command of this process."""
        self.json, self.verbosity, self._answered = json, 0, False

    def configure(self, *, json: bool, quiet: int, verbose: int) -> None:
        """Take a command's own `--json`, `-q` and `-v`, which add to those given before the command."""
        self.json = self.json or json
        self.verbosity = max(-2, self.verbosity + min(verbose, 1) - quiet)

    @property
    def shows_progress(self) -> bool:
        """Whether progress may be drawn: not with --json, -q, -v or MBX_NO_PROGRESS."""
        return not self.json and self.verbosity == 0 and not os.environ.get("MBX_NO_PROGRESS")

    def result(self, document: Document, lines: Callable[[], Iterable[str]]) -> None:
        """The answer of a command: `document` with --json, else the text that `lines` makes."""
        if self.json:
            self._answer(document)
        elif self.verbosity > -2:
            for line in lines():
                _write(sys.stdout, line)

    def message(self, text: str) -> None:
        """A line for the human at the terminal."""
        if self.verbosity > -1 and not self.json:
            _write(sys.stderr, text)

    def detail(self, text: str) -> None:
        """A line that only -v shows."""
        if self.verbosity > 0:
            _write(sys.stderr, text)

    def warning(self, text: str) -> None:
        """Something that was done but deserves a look."""
        if self.verbosity > -1:
            _write(sys.stderr, f"{paint('warning:', 'yellow', sys.stderr)} {text}")

    def error(self, error: MbxError, exit_code: int | None = None) -> int:
        """Report a failure and return its exit code; with --json, as the one document unless there was one."""
        code = error.exit_code if exit_code is None else exit_code
        if os.environ.get("MBX_DEBUG") == "1":
            for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
                _write(sys.stderr, f"| {line}")  # set apart: a name in a message may hold line breaks
        if self.json and not self._answered:
            parts = {"fact": error.fact, "hint": error.hint, "details": list(error.details), "exit_code": code}
            self._answer({"error": parts})
            return code
        label = "error:"
        for n, line in enumerate(folded(f"{label} {error.fact}", "", sys.stderr)):
            _write(sys.stderr, line if n else f"{paint(label, 'red', sys.stderr)}{line.removeprefix(label)}")
        for detail in error.details[:_SHOWN_DETAILS]:
            for line in folded(detail, "  ", sys.stderr):
                _write(sys.stderr, line)
        if (rest := len(error.details) - _SHOWN_DETAILS) > 0:
            _write(sys.stderr, f"  … and {rest} more; --json lists all")
        if error.hint:
            _write(sys.stderr, f"{paint('hint:', 'cyan', sys.stderr)} {error.hint}")
        return code

    def error_text(self, text: str) -> None:
        """Text for a human who asked wrongly, such as the help of a command."""
        for line in text.split("\n"):
            _write(sys.stderr, line)

    def _answer(self, document: Document) -> None:
        if self._answered:
            raise AssertionError("a command printed two JSON documents")
        self._answered = True
        text = redacted(in_flags(json.dumps(document, indent=1, ensure_ascii=False)))
        sys.stdout.write("\n".join(map(_as_json, text.split("\n"))) + "\n")


out = Output()


def flag(choice: str) -> str:
    """A choice as this command line takes it."""
    return f"--{choice}"


def in_flags(text: str) -> str:
    """`text` with each choice that it names as this command line spells it."""
    return spelt(text, flag)


def folded(text: str, indent: str = "", stream: TextIO | None = None) -> list[str]:
    """Words behind an indent: on a terminal in lines of its width, the later ones set in; elsewhere a line to search.

    Hints are not for this: a command that is copied from the screen stays in one line.
    """
    if not (stream or sys.stdout).isatty():
        return [indent + text]
    width = screen_width()
    return textwrap.wrap(
        in_flags(text),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    ) or [indent]


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in a colour where `stream` (stdout by default) shows colours; NO_COLOR and FORCE_COLOR hold."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR"):
        return text
    forced = os.environ.get("FORCE_COLOR", "") not in ("", "0")
    if forced or (stream.isatty() and os.environ.get("TERM") != "dumb"):
        coloured = f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"
        _painted[coloured] += 1
        return coloured
    return text


def _as_json(line: str) -> str:
    """A line of a JSON document, what is not printable in it as JSON's own escapes."""
    return line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _safe(line: str) -> str:
    """A line whose only controls are the colours that `paint` gave."""
    parts, at = [], 0
    for found in _COLOURED.finditer(line):
        if _painted[found[0]]:
            _painted[found[0]] -= 1
            start, end = found[0].index("m") + 1, len(found[0]) - len("\x1b[0m")
            parts += [printable(line[at : found.start()]), found[0][:start], printable(found[0][start:end]), "\x1b[0m"]
            at = found.end()
    return "".join([*parts, printable(line[at:])])


def _write(stream: TextIO, line: str) -> None:
    """One line; where the stream's encoding lacks a character, its plain spelling."""
    line = _safe(redacted(in_flags(line)))
    encoding = stream.encoding or "utf-8"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        for fancy, plain in _PLAIN.items():
            line = line.replace(fancy, plain)
        line = line.encode(encoding, "backslashreplace").decode(encoding)
    stream.write(line + "\n")
