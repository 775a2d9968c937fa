"""The gate for names: a file that another file names is opened or made within its folder, or not at all.

Layouts, indices, manifests and DCP metadata come from strangers as often as weights do. Every name that one of them
gives passes here before it is used, and what is written follows no link out of the folder that it is written to.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from converters.errors import StorageError

#: What Linux takes of a name and, with room for the folder before it, of a path.
_LONGEST_PART = 255
_LONGEST = 2048


def is_inside(relative: str) -> bool:
    """Whether a stored relative path stays in its folder and names a file."""
    try:
        parts = relative.encode().split(b"/")
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    named = all(part not in (b"", b".", b"..") and len(part) <= _LONGEST_PART for part in parts)
    return named and len(relative) <= _LONGEST and "\\" not in relative and "\0" not in relative


def inside(relative: object, source: str) -> str:
    """`relative` as a path within the folder that `source` (words for an error) speaks of; else a StorageError."""
    if not isinstance(relative, str) or not is_inside(relative):
        raise StorageError(
            f"{source} names the file {relative!r}"[:300] + ", which does not lie in its folder",
            hint="nothing was read or written there; check where the checkpoint comes from",
        )
    return relative


def leads_out(path: Path) -> bool:
    """Whether a path is a link that leads out of its folder; a hub cache's links to its own blobs do not count."""
    if not path.is_symlink():
        return False
    home, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    caches = [commit.parent.parent for commit in (home, home.parent) if commit.parent.name == "snapshots"]
    return not any(real.is_relative_to(owner) for owner in (home, *(cache / "blobs" for cache in caches)))


def writable(root: Path, name: str) -> Path:
    """`root / name`, which is going to be written; StorageError where a link or a special file stands there."""
    path = root / name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        what = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise StorageError(f"`{path}` is {what}; nothing was written through it")
    return path


def create(root: Path, relative: str) -> int:
    """A descriptor to write `relative` below `root`, folders made as needed; what the file holds is kept.

    StorageError for a path that leaves `root`, by its name or through a link; OSError as the system gives it.
    """
    path = root / inside(relative, f"the plan of `{root}`")
    path.parent.mkdir(parents=True, exist_ok=True)
    home, parent = os.path.realpath(root), os.path.realpath(path.parent)
    if os.path.commonpath((home, parent)) != home:
        raise StorageError(f"`{path}` leads out of `{root}` through a link; nothing was written")
    # Not for reading: NFS would then read a page before part of it is written, and later write all of it back, with
    # what another host's process has put beside that part in the meantime undone.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StorageError(f"`{path}` is a link; nothing was written through it") from error
        raise
