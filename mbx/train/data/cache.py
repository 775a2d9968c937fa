"""Where prepared data lies, so that it is made once: by one process of those that want it, for all later starts.

$MBX_CACHE_DIR, $XDG_CACHE_HOME/mbx or ~/.cache/mbx, in it `data/KEY/` an entry, KEY the SHA-256 of all that decides
what is in it. Whoever makes an entry holds a lock on `KEY.lock`, writes into `KEY.partial` and renames; others wait
for the lock. What belongs to another user, or what others may write, is not used.

Entries together take no more than $MBX_CACHE_MAX, 50 GB unless set: a new one displaces those that were not used for
the longest time. Whoever uses an entry shares a lock on `KEY.used` until its process ends, and is not displaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from converters.errors import StorageError
from mbx.text import parse_size

_VARIABLE = "MBX_CACHE_DIR"
_MOST = "MBX_CACHE_MAX"
_HINT = f"{_VARIABLE}=DIR names a folder of your own"
_KEY = re.compile(r"[0-9a-f]{64}")
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
#: Locks on the use of entries, which end with this process.
_USED: dict[str, int] = {}
Entry = TypeVar("Entry")


def cache_folder() -> Path:
    """The folder of prepared data, made if need be; StorageError where it is not this user's alone to write."""
    own = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get(_VARIABLE) or Path(own) / "mbx") / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot make the cache `{folder}`: {error.strerror}", hint=_HINT) from error
    if not trusted(folder):
        raise StorageError(
            f"the cache `{folder}` is not used: it is a link, or others than you may write into it", hint=_HINT
        )
    return folder


def trusted(path: Path) -> bool:
    """Whether `path`, and what lies in it, is this user's own and nobody else's to write; no links."""
    for one in (path, *(path.iterdir() if path.is_dir() and not path.is_symlink() and path.name != "data" else ())):
        found = one.lstat()
        regular = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
        if not regular or found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
    return True


def cached(key: str, make: Callable[[Path], None], read: Callable[[Path], Entry]) -> tuple[Entry, bool]:
    """The entry `key`, and whether it was there: read, or made first where it is not there or cannot be used."""
    folder = cache_folder()
    entry, draft = folder / key, folder / f"{key}.partial"
    with _locked(folder / f"{key}.lock"):
        if os.path.lexists(entry):
            if trusted(entry):
                try:
                    found = read(entry)
                    os.utime(entry)
                    _use(folder, key)
                    return found, True
                except StorageError:  # damaged: made again
                    pass
            _remove(entry)
        if os.path.lexists(draft):  # of a process that was killed: nobody else holds the lock
            _remove(draft)
        try:
            draft.mkdir(mode=0o700)
            make(draft)
            draft.rename(entry)
        except OSError as error:
            _remove(draft)
            raise StorageError(f"cannot write the cache `{entry}`: {error.strerror or error}", hint=_HINT) from error
        except BaseException:
            _remove(draft)
            raise
        _use(folder, key)
        return read(entry), False


def most_bytes() -> int:
    """What entries may take together; UsageError where the variable's value is no size."""
    return parse_size(os.environ.get(_MOST) or "50GB")


def taken_bytes() -> int:
    """What entries take together."""
    return sum(map(_size, _entries(cache_folder())))


def make_room(key: str) -> tuple[int, int]:
    """Remove what was not used for the longest time, until all fits beside the entry `key`; entries and bytes of it.

    What is in use, or being made, stays, so that more than the limit may be taken for a while.
    """
    folder = cache_folder()
    oldest = sorted(_entries(folder), key=lambda entry: entry.stat().st_mtime)
    left, removed, freed = sum(map(_size, oldest)), 0, 0
    for entry in oldest:
        if left <= most_bytes():
            break
        if entry.name == key or not trusted(entry):
            continue
        try:
            with (
                _locked(folder / f"{entry.name}.lock", wait=False),
                _locked(folder / f"{entry.name}.used", wait=False),
            ):
                size = _size(entry)
                _remove(entry)
        except BlockingIOError:
            continue
        left, removed, freed = left - size, removed + 1, freed + size
    return removed, freed


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _KEY.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _size(entry: Path) -> int:
    return sum(path.lstat().st_size for path in entry.iterdir())


def _use(folder: Path, key: str) -> None:
    """Share the lock on an entry's use until this process ends."""
    if key not in _USED:
        _USED[key] = os.open(folder / f"{key}.used", _LOCK, 0o600)
        with contextlib.suppress(OSError):  # some network file systems lock nothing: there the oldest may be in use
            fcntl.flock(_USED[key], fcntl.LOCK_SH)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """A lock of one holder; BlockingIOError where another has it and this does not `wait`."""
    with contextlib.ExitStack() as held:
        try:
            lock = os.open(path, _LOCK, 0o600)
            held.callback(os.close, lock)
            # waits for whoever makes the entry; ends with the process that holds it
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems lock nothing
            raise StorageError(f"cannot lock the cache `{path}`: {error.strerror}", hint=_HINT) from error
        yield
