"""Small files of strangers: regular files alone, no larger than their kind is, and never waited for."""

from __future__ import annotations

import errno
import json
import os
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

from converters.errors import StorageError
from mbx.untrusted.stand_ins import stand_in
from mbx.untrusted.values import check_plain

#: The largest file of each kind that is read whole, in bytes, far above what any known tool writes.
POINTER = 4 << 10
SETTINGS = 16 << 20
#: An index, a layout or a manifest has an entry a tensor or a chunk: a million of them.
INDEX = 1 << 28
_BLOCK = 1 << 20


def open_regular(path: Path) -> int:
    """A descriptor that reads a regular file, through links; whoever gets it closes it.

    A pipe, a device or a socket is a StorageError at once: opening one could wait for ever, reading one never end.
    FileNotFoundError, NotADirectoryError and IsADirectoryError are raised as the system gives them.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EINVAL):  # a socket
            raise StorageError(f"`{path}` is no regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise StorageError(f"`{path}` is no regular file", hint="a pipe or a device is not read")
    return descriptor


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; StorageError for a larger one, OSError as it comes."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise StorageError(f"`{path}` has {size} bytes; at most {limit} are read")
        parts, room = [], limit + 1  # a file may grow while it is read
        while room and (part := os.read(descriptor, min(_BLOCK, room))):
            parts.append(part)
            room -= len(part)
    finally:
        os.close(descriptor)
    if not room:
        raise StorageError(f"`{path}` has more than {limit} bytes; at most that many are read")
    return b"".join(parts)


def digest_of(path: Path) -> str:
    """SHA-256 of a regular file of any size, in hexadecimal; errors as of `open_regular`."""
    done = sha256()
    with open(open_regular(path), "rb", buffering=0) as file:
        while block := file.read(8 * _BLOCK):
            done.update(block)
    return done.hexdigest()


def read_text(path: Path, limit: int) -> str:
    """The same as UTF-8 text; StorageError where it is none."""
    try:
        return read_small(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"`{path}` cannot be read: {error}") from error


def read_json(path: Path, limit: int = SETTINGS) -> dict[str, Any]:
    """A JSON object from a small file; StorageError where there is none, FileNotFoundError where there is no file."""
    try:
        loaded = json.loads(read_text(path, limit))
        check_plain(loaded)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink() and (found := stand_in(path)) is not None:
            raise found from None
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise stand_in(path) or StorageError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise StorageError(f"`{path}` is not a JSON object")
    return loaded
