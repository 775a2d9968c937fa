"""All or nothing: a target folder appears whole, under its name, or not at all.

Work happens in `DST.partial/` beside the target; `commit` flushes it to the disk and renames it. A run that fails
or is killed leaves `DST.partial/` behind when there is work in it to go on from (see `mbx.run.journal`).

Nothing is removed that mbx did not make, but for a target's old contents where `overwrite` asks for that, and then
only a checkpoint's that no source links into. What a run needs beside `DST.partial/` is hidden under names that
nobody gives by hand, `.DST.mbx-*`: a `DST.old` is a user's backup.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from converters.errors import DeviceError, UsageError
from mbx.formats.files import os_failure, sync_folder
from mbx.run import journal
from mbx.run.replaceable import foreign, foreign_in_work
from mbx.text import human_bytes

#: Names that an error lists.
_SHOWN = 20


def check_target(target: Path, reads: Iterable[Path | None], *, overwrite: bool) -> None:
    """Refuse a target that is not empty (without `overwrite`), or that overlaps a folder of `reads`."""
    dst = Path(os.path.realpath(target))
    if dst.is_symlink():
        raise UsageError(f"the destination `{target}` is a link that leads nowhere: in a circle")
    for source in reads:
        if source is None:
            continue
        src = Path(os.path.realpath(source))
        if src == dst or src in dst.parents or dst in src.parents:
            raise UsageError(f"the destination `{target}` and the source `{source}` lie inside one another")
        if link := next((link for link in _links(src) if dst in Path(os.path.realpath(link)).parents), None):
            raise UsageError(f"the destination `{target}` holds what the source links to: `{link}`")
    _check_replaceable(dst, target, overwrite=overwrite)


def _links(folder: Path) -> Iterator[Path]:
    """Links below a folder; none is followed."""
    for at, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if (path := Path(at, name)).is_symlink())


def _check_replaceable(folder: Path, target: Path, *, overwrite: bool) -> None:
    """UsageError for what stands at `folder` and was not given up, or is no checkpoint's; the user calls it `target`.

    A path that goes through what does not exist, `new/../here`, names something all the same: `folder` is resolved.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the destination `{target}` is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"the destination `{target}` is not empty", hint="add ‹overwrite› to replace it")
    if strangers := foreign(folder):
        none = len(strangers) == sum(1 for path in folder.rglob("*") if not path.is_dir())
        what = "no checkpoint" if none else "more than a checkpoint"
        raise UsageError(
            f"the destination `{target}` holds {what}: ‹overwrite› would remove `{strangers[0]}`",
            hint="choose another destination, or move what stands in the way",
            details=strangers[:_SHOWN],
        )


def partial_path(target: Path) -> Path:
    """The folder a target is made in. A target that is a link is made where the link points."""
    final = Path(os.path.realpath(target))
    return final.with_name(final.name + ".partial")


class PartialFolder:
    """`with PartialFolder(target) as folder:` write into `folder.path`; leave without `commit` and it is removed.

    It stays when `keep` is set. One that an interrupted run left is taken over with `resume` (`resumed` says that
    there was one), replaced with `overwrite`, and a UsageError with neither. Only one process at a time may hold
    the folder of a target: a second one gets a UsageError.
    """

    def __init__(self, target: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.target = target
        self.path = partial_path(target)
        self.keep = self.resumed = False
        self._resume, self._overwrite = resume, overwrite
        self._final = self.path.with_name(self.path.name.removesuffix(".partial"))
        self._old, self._dead, self._lock_path = (
            self._final.with_name(f".{self._final.name}.mbx-{what}") for what in ("old", "dead", "lock")
        )
        self._journal = self.path / journal.FOLDER
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> PartialFolder:
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._finish_exchange()
                _check_replaceable(self._final, self.target, overwrite=self._overwrite)
                self._open()
            except BaseException:
                self._unlock()
                raise
        except OSError as error:
            raise os_failure(error, f"cannot write beside `{self.target}`") from error
        return self

    def _take_lock(self) -> int:
        while True:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before removes the file: a lock on one that has no name any more protects nothing.
                if os.path.exists(self._lock_path) and os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    return lock
            except BlockingIOError as error:
                os.close(lock)
                raise UsageError(
                    f"another run is writing `{self.target}`", hint="wait for it, or choose another name"
                ) from error
            except FileNotFoundError:
                pass  # removed between the two looks: take a new one
            except OSError as error:
                os.close(lock)
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise os_failure(error, f"the file system of `{self.target}` has no file locks") from error
                raise
            os.close(lock)

    def _finish_exchange(self) -> None:
        """Undo or finish what a run that was killed between the renames of `commit` left."""
        if self._dead.exists():
            if self.path.is_dir() and not self._journal.exists() and (self._dead / "run.json").is_file():
                self._dead.rename(self._journal)  # it says whose the finished work is
            else:
                shutil.rmtree(self._dead)
        if not self._old.exists():
            return
        if not self._final.exists() or not any(self._final.iterdir()):
            self._old.rename(self._final)
        elif self.path.exists() or foreign(self._old):
            raise UsageError(
                f"`{self._old}` is what stood at `{self.target}`, where an interrupted run was to replace it, and "
                "something else stands there now",
                hint="move one of the two away",
            )
        else:
            self._remove(self._old)

    def _remove(self, folder: Path) -> None:
        """Remove what was found replaceable; renamed first, so that nobody meets half of it."""
        folder.rename(self._dead)
        shutil.rmtree(self._dead)

    def _open(self) -> None:
        if self.path.is_symlink():
            raise UsageError(f"`{self.path}` is where the result is made, and is a link", hint="remove it")
        if self.path.exists():
            if self._resume and self._journal.is_dir():
                self._refuse_links()
                self._refuse_foreign()
                self.resumed = self.keep = True
                return
            if not self._overwrite and not self._resume and journal.has_progress(self.path):
                raise UsageError(
                    f"`{self.path}` holds what an interrupted run wrote",
                    hint="‹resume› goes on from there, ‹overwrite› starts again",
                )
            self._refuse_foreign()
            self._remove(self.path)
        self.path.mkdir()

    def _refuse_links(self) -> None:
        """UsageError for a folder of work with links, symbolic or hard: writing on would follow them."""
        linked = (path for path in self.path.rglob("*") if path.is_symlink() or _has_other_names(path))
        if link := next(linked, None):
            raise UsageError(
                f"`{link}` is a link, which no run of mbx left there: it is not followed",
                hint="‹overwrite› starts again",
            )

    def _refuse_foreign(self) -> None:
        """UsageError for a folder of work with something in it that no run made."""
        if strangers := foreign_in_work(self.path):
            raise UsageError(
                f"`{self.path}` is where the result is made, and holds what no run of mbx left there: "
                f"`{strangers[0]}`",
                hint="move it, or choose another destination",
                details=strangers[:_SHOWN],
            )

    def commit(self, *, sync: bool = True) -> None:
        """Flush folders, then give the finished folder its name; what stood there before is removed last.

        UsageError where something appeared under the name that nobody said to replace; the finished work stays.
        """
        try:
            self.keep = True
            _check_replaceable(self._final, self.target, overwrite=self._overwrite)
            if sync:
                for folder, _, _ in os.walk(self.path):
                    sync_folder(Path(folder))
            # Moved out, not removed: other processes of this run may be writing into it.
            if self._journal.is_dir():
                self._journal.rename(self._dead)
            if self._final.exists():
                self._final.rename(self._old)
            try:
                if self._old.exists():  # once more, now that nobody finds it by its name
                    _check_replaceable(self._old, self.target, overwrite=self._overwrite)
                self.path.rename(self._final)
            except BaseException:
                if self._old.exists():
                    self._old.rename(self._final)
                raise
            self._committed = True
            if sync:
                sync_folder(self._final.parent)
            if self._dead.exists():
                shutil.rmtree(self._dead)
            if self._old.exists():
                self._remove(self._old)
        except OSError as error:
            raise os_failure(error, f"cannot name the finished folder `{self.target}`") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._committed and not self.keep and self.path.exists():
                shutil.rmtree(self.path)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            if not os.fstat(self._lock).st_size:  # a lock file is empty
                self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _has_other_names(path: Path) -> bool:
    return path.is_file() and path.stat().st_nlink > 1


def check_free_space(target: Path, needed_bytes: int) -> int:
    """Bytes free where `target` will lie; DeviceError when `needed_bytes` do not fit.

    What an interrupted run of the same target occupies counts as free: it is gone on with, or replaced.
    """
    folder = partial_path(target).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + _occupied(partial_path(target))
    if free < needed_bytes:
        raise DeviceError(
            f"`{folder}` has {human_bytes(free)} free; the result needs {human_bytes(needed_bytes)}",
            hint="free space, or choose another destination",
        )
    return free


def _occupied(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
