"""What callers name and hand over: checkpoints by path or hub name, and what is told of progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

from converters.errors import Cancelled
from mbx.formats.hub import resolve

Source = str | os.PathLike[str]
Progress = Callable[[int], None]


def silent(nbytes: int) -> None:
    """No progress."""


def config_folder(source: Source | None) -> Path | None:
    """The folder of a model's config.json, without its weights where it is downloaded; None of None."""
    return None if source is None else folder_of(source, weights=False)


def folder_of(source: Source, *, weights: bool = True) -> Path:
    """The folder of a source, downloaded where it is a hub model."""
    return resolve(os.fspath(source), weights=weights).path


def watched(progress: Progress, cancel: Event | None) -> Progress:
    """`progress`, which also ends the work once `cancel` is set."""
    if cancel is None:
        return progress

    def advance(nbytes: int) -> None:
        if cancel.is_set():
            raise Cancelled("cancelled")
        progress(nbytes)

    return advance
