"""What every part of `benchmarks.engine` works with: a folder, results that are kept, processes on a quiet disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make
from benchmarks.conversion import Sample, measure

Result = dict[str, Any]


class Bench:
    """Where to work, what was found, and until when to go on."""

    def __init__(self, folder: Path, results: Result, save: Callable[[], None], deadline: float, quick: bool) -> None:
        self.folder, self.results, self.save = folder, results, save
        self.deadline, self.quick = deadline, quick

    def sized(self, size: str) -> str:
        """The size to measure: a tiny one of its kind in a trial run."""
        return ("tiny" + ("-" + size if size in ("fp8", "mxfp4") else "")) if self.quick else size

    def source(self, size: str, *, sparse: bool = False) -> Path:
        """A source of this size, in the page cache."""
        path = self.folder / "source"
        remove(path)
        make(path, self.sized(size), sparse=sparse)
        os.sync()
        cat(path)
        return path

    def rounds(self, count: int) -> range:
        """Rounds to measure: one in a trial run."""
        return range(1 if self.quick else count)

    def note(self, key: str, samples: Sequence[Sample], **more: object) -> None:
        """Store samples, and say so."""
        self.results[key] = {"samples": [asdict(sample) for sample in samples], **more}
        self.save()
        best = min((sample.seconds for sample in samples), default=0.0)
        speed = f" {int(str(more['bytes'])) / 1e9 / best:6.2f} GB/s" if best and "bytes" in more else ""
        peak = max((sample.peak_mib for sample in samples), default=0.0)
        print(f"{key:<44} {best:7.2f} s{speed} {peak:6.0f} MiB", flush=True)

    @property
    def late(self) -> bool:
        """Whether no more should be started."""
        return time.monotonic() > self.deadline


def remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def cat(path: Path) -> Sample:
    return measure(["sh", "-c", f'find "{path}" -type f -exec cat {{}} + >/dev/null'])


def drop(path: Path) -> None:
    """Put a folder's files out of the page cache."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def once(command: Sequence[str], *targets: Path) -> Sample:
    """One process from a quiet disk; what it makes is removed first."""
    remove(*targets)
    os.sync()
    return measure(command)
