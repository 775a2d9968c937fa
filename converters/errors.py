"""Every error a user can meet: a fact, a hint to paste, and the exit code it ends with.

A text names what the caller chose as `‹tp›`, whoever the caller is: `spelt` puts it in the caller's own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar

_CHOICE = re.compile(r"‹([a-z-]+)›")


def in_python(choice: str) -> str:
    """A choice as a keyword argument: `max-memory` is `max_memory`, in backticks."""
    return f"`{choice.replace('-', '_')}`"


def spelt(text: str, spelling: Callable[[str], str] = in_python) -> str:
    """`text` with each choice that it names in the words of its reader, such as `--tp` for `‹tp›`."""
    return _CHOICE.sub(lambda found: spelling(found[1]), text)


class MbxError(Exception):
    """Base of all expected failures.

    `fact` says what is wrong with got and expected values; `hint` is a command or an action;
    `details` lists every further instance (all unmapped tensors, say), one line each, worked out when they are asked
    for where a function is given. They name choices as `‹tp›`; `str(error)` is the fact in Python's words.
    """

    exit_code: ClassVar[int] = 70

    def __init__(
        self, fact: str, *, hint: str | None = None, details: Sequence[str] | Callable[[], Sequence[str]] = ()
    ) -> None:
        super().__init__(spelt(fact))
        self.fact = fact
        self.hint = hint
        self._details = details

    @property
    def details(self) -> tuple[str, ...]:
        """Every further instance."""
        if callable(self._details):
            self._details = self._details()
        return tuple(self._details)

    @details.setter
    def details(self, lines: Sequence[str]) -> None:
        self._details = lines


class Cancelled(MbxError):
    """The caller ended the work."""

    exit_code = 130


class DifferenceError(MbxError):
    """A check ran to its end and found a difference."""

    exit_code = 1


class UsageError(MbxError):
    """The command line, a setting or a config value cannot be honoured."""

    exit_code = 2


class LayoutError(UsageError):
    """The requested parallel layout does not fit the model."""


class UnsupportedError(MbxError):
    """The architecture has no table, or the table does not cover this checkpoint."""

    exit_code = 3


class TableError(UnsupportedError):
    """A mapping table is malformed: the message names the file and the row."""


class CoverageError(UnsupportedError):
    """Tensors or config keys were left over, missing or claimed twice."""


class StorageError(MbxError):
    """A file or a hub could not be read or written, or its content is not valid."""

    exit_code = 4


class DeviceError(MbxError):
    """Memory, disk space or an accelerator does not suffice."""

    exit_code = 5
