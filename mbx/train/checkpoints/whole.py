"""Small files of a run's folder, each there whole or not at all, whenever the machine stops."""

from __future__ import annotations

import os
from pathlib import Path

from mbx.untrusted.names import writable


def write_whole(folder: Path, name: str, text: str) -> None:
    """Write `text` to a file of `folder` and have it on the disk; OSError where that fails: what was there stays."""
    draft = writable(folder, f"{Path(name).stem}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        sync(draft)
        draft.replace(writable(folder, name))
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync(folder)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
