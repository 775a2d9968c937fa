"""All or nothing: a target folder appears whole, under its name, or not at all.

Work happens in `DST.partial/` beside the target; `commit` flushes it to the disk and renames it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from converters.errors import DeviceError, UsageError
from mbx.io.files import os_failure


def check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a target that is not empty (without `overwrite`), or that overlaps the source."""
    src, dst = source.resolve(), target.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise UsageError(f"the destination `{target}` and the source `{source}` lie inside one another")
    if target.exists() and not target.is_dir():
        raise UsageError(f"the destination `{target}` is a file")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"the destination `{target}` is not empty", hint="add --overwrite to replace it")


class PartialFolder:
    """`with PartialFolder(target) as folder:` write into `folder.path`; leave without `commit` and it is removed."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self._lock_path = target.with_name(target.name + ".lock")
        self._lock: int | None = None

    def __enter__(self) -> PartialFolder:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            raise UsageError(
                f"another run is writing `{self.target}`", hint="wait for it, or choose another name"
            ) from error
        except OSError as error:
            raise os_failure(error, f"cannot write beside `{self.target}`") from error
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir()
        return self

    def commit(self) -> None:
        """Flush folders, then give the finished folder its name; what stood there before is removed last."""
        for folder, _, _ in os.walk(self.path):
            _sync_folder(Path(folder))
        old = self.target.with_name(self.target.name + ".old")
        try:
            if self.target.exists():
                self.target.rename(old)
            self.path.rename(self.target)
            _sync_folder(self.target.parent)
        except OSError as error:
            raise os_failure(error, f"cannot name the finished folder `{self.target}`") from error
        if old.exists():
            shutil.rmtree(old)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and flush it to the disk."""
    try:
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise os_failure(error, f"writing `{path}`") from error


def check_free_space(target: Path, needed_bytes: int) -> int:
    """Bytes free where `target` will lie; DeviceError when `needed_bytes` do not fit."""
    folder = target
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DeviceError(
            f"`{folder}` has {free / 2**30:.1f} GiB free; the result needs {needed_bytes / 2**30:.1f} GiB",
            hint="free space, or choose another destination",
        )
    return free


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
