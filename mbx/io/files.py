"""Files of a checkpoint folder, read and written by region from many threads."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path

from converters.errors import DeviceError, StorageError
from converters.tensors import Chunk
from mbx.io.archive import ArchiveFrame, file_reader, locate_tensor, tensor_archive


def os_failure(error: OSError, what: str) -> StorageError | DeviceError:
    """The mbx error for an operating system one; a full disk is a DeviceError."""
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return DeviceError(f"{what}: {error.strerror}", hint="free space, or choose another destination")
    return StorageError(f"{what}: {error.strerror or error}")


class FileSource:
    """Reads chunks below `root`; file descriptors stay open until `close`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def _descriptor(self, file: str) -> int:
        fd = self._descriptors.get(file)
        if fd is None:
            with self._lock:
                if (fd := self._descriptors.get(file)) is None:
                    try:
                        fd = self._descriptors[file] = os.open(self.root / file, os.O_RDONLY)
                    except OSError as error:
                        raise os_failure(error, f"cannot open `{self.root / file}`") from error
        return fd

    def data_start(self, chunk: Chunk) -> int:
        """Where a chunk's data begin; archives are opened and checked against the chunk on first use."""
        if not chunk.archive_bytes:
            return chunk.start
        key = (chunk.file, chunk.start)
        start = self._starts.get(key)
        if start is None:
            where = f"{self.root / chunk.file} at byte {chunk.start}"
            found = locate_tensor(
                file_reader(self._descriptor(chunk.file), chunk.start), chunk.archive_bytes, source=where
            )
            if found.shape != chunk.sizes:
                raise StorageError(f"{where}: holds shape {list(found.shape)}; the index says {list(chunk.sizes)}")
            start = self._starts[key] = chunk.start + found.data_offset
        return start

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start`; a file that ends before is a StorageError."""
        fd, done = self._descriptor(file), 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], start + done)
            except OSError as error:
                raise os_failure(error, f"reading `{self.root / file}`") from error
            if count == 0:
                raise StorageError(
                    f"`{self.root / file}` ends at byte {start + done}; {len(buffer) - done} more expected"
                )
            done += count

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._descriptors.values():
            os.close(fd)
        self._descriptors.clear()


@lru_cache(maxsize=65536)
def frame(dtype: str, sizes: tuple[int, ...]) -> ArchiveFrame:
    """Archive frame of one chunk."""
    return tensor_archive(dtype, sizes)


class FileSink:
    """Writes chunks below `root` into files created at their final size."""

    def __init__(
        self, root: Path, sizes: dict[str, int], archive_dtypes: dict[tuple[str, int], str] | None = None
    ) -> None:
        self.root = root
        self._archive_dtypes = archive_dtypes or {}
        self._descriptors: dict[str, int] = {}
        for file, size in sizes.items():
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = self._descriptors[file] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                os.ftruncate(fd, size)
            except OSError as error:
                raise os_failure(error, f"cannot create `{path}` of {size} bytes") from error

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start`."""
        fd, done = self._descriptors[file], 0
        while done < len(data):
            try:
                done += os.pwrite(fd, data[done:], start + done)
            except OSError as error:
                raise os_failure(error, f"writing `{self.root / file}`") from error

    def data_start(self, chunk: Chunk) -> int:
        """Where a chunk's data begin: behind the archive's prefix."""
        if not chunk.archive_bytes:
            return chunk.start
        return chunk.start + len(frame(self._archive_dtypes[chunk.file, chunk.start], chunk.sizes).prefix)

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Write an archive's prefix and suffix around finished data."""
        if chunk.archive_bytes:
            around = frame(dtype, chunk.sizes)
            self.write(chunk.file, chunk.start, memoryview(around.prefix))
            end = chunk.start + len(around.prefix) + around.data_nbytes
            self.write(chunk.file, end, memoryview(around.suffix(crc32)))

    def close(self, *, sync: bool) -> None:
        """Close every file, after flushing it to the disk when `sync` is set."""
        for file, fd in self._descriptors.items():
            try:
                if sync:
                    os.fsync(fd)
            except OSError as error:
                raise os_failure(error, f"flushing `{self.root / file}`") from error
            finally:
                os.close(fd)
        self._descriptors.clear()
