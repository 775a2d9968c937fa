"""What lies where a file was expected: a pointer to it, a web page, a link to where it is not, nothing."""

from __future__ import annotations

from pathlib import Path

from converters.errors import StorageError

#: How a Git LFS pointer begins, which stands for the file until it is fetched.
_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_AGAIN = "`hf download ORG/NAME --local-dir DIR`"
_BLOCK = 64


def stand_in(path: Path) -> StorageError | None:
    """What to say of a file that is not the one its name promises; None where nothing shows it."""
    if path.is_symlink() and not path.exists():
        return StorageError(
            f"{path}: a link to `{path.readlink()}`, which is not there",
            hint=f"the folder was copied without what its links lead to: copy it by `cp -rL`, or {_AGAIN}",
        )
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(_BLOCK)
    nbytes = path.stat().st_size
    if start.startswith(_POINTER):
        return StorageError(
            f"{path}: a Git LFS pointer of {nbytes} bytes; the file itself was not fetched",
            hint=f"`git lfs pull` in that folder, or {_AGAIN}",
        )
    if start.lstrip().lower().startswith(_PAGES):
        return StorageError(
            f"{path}: a web page of {nbytes} bytes, saved under this name",
            hint=f"a download was refused, or led elsewhere: {_AGAIN}, after `hf auth login` where a model is gated",
        )
    if not nbytes:
        return StorageError(f"{path}: an empty file", hint=f"its download was broken off: {_AGAIN}")
    return None
