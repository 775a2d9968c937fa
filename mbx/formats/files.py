"""Files of a checkpoint folder, read and written by region from many threads."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from converters.errors import DeviceError, StorageError
from converters.tensors import Chunk
from mbx.torchfile.archive import ArchiveFrame, file_reader, locate_tensor, tensor_archive
from mbx.untrusted.names import create
from mbx.untrusted.small_files import open_regular

#: What mbx writes beside a checkpoint of either kind: where it came from, and the CRC-32 of every byte.
MANIFEST = "mbx_manifest.json"
#: It has a line a tensor, with every chunk of it.
MANIFEST_BYTES = 1 << 30
#: Where among its waivers the unknown keys of config.json stand.
WAIVED_KEYS = "config_keys"
#: Its list of tensors that scales of channels are folded into.
SCALED = "scaled"
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
#: Bytes written at once. Linux gives a longer write larger pages (ext4 since 6.16), which are seldom the ones just
#: freed: where a hypervisor must find memory for them first, writes of 4 MiB took three times the processor's time.
_SLICE = 1 << 18


def os_failure(error: OSError, what: str) -> StorageError | DeviceError:
    """The mbx error for an operating system one; a full disk is a DeviceError."""
    if error.errno in _FULL:
        return DeviceError(f"{what}: {error.strerror}", hint="free space, or choose another destination")
    if error.errno == errno.EFBIG:
        return DeviceError(f"{what}: {error.strerror}", hint="raise the limit on file sizes: ulimit -f unlimited")
    return StorageError(f"{what}: {error.strerror or error}")


def _allow_many_files() -> None:
    """Raise the soft limit on open files to the hard one: a checkpoint of many ranks has thousands of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and (hard == resource.RLIM_INFINITY or soft < hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # refused in some sandboxes: the soft limit stays, and EMFILE names the file
            return


class FileSource:
    """Reads chunks below `root`; file descriptors stay open until `close`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        _allow_many_files()

    def _descriptor(self, file: str) -> int:
        fd = self._descriptors.get(file)
        if fd is None:
            with self._lock:
                if (fd := self._descriptors.get(file)) is None:
                    try:
                        fd = self._descriptors[file] = open_regular(self.root / file)
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
            try:
                found = locate_tensor(
                    file_reader(self._descriptor(chunk.file), chunk.start), chunk.archive_bytes, source=where
                )
            except OSError as error:
                raise os_failure(error, f"reading `{where}`") from error
            if found.shape != chunk.stored_sizes:
                raise StorageError(
                    f"{where}: holds shape {list(found.shape)}; the index says {list(chunk.stored_sizes)}"
                )
            start = self._starts[key] = chunk.start + found.data_offset
        return start

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start`; a file that ends before is a StorageError."""
        fd, done = self._descriptor(file), 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], start + done)
            except OSError as error:
                raise os_failure(error, f"reading `{self.root / file}` at byte {start + done}") from error
            if count == 0:
                raise StorageError(
                    f"`{self.root / file}` ends at byte {start + done}; {len(buffer) - done} more expected",
                    hint="the file was cut short: download or copy it again",
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


@lru_cache(maxsize=65536)
def frame_bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    """Bytes of one chunk's archive, data included."""
    return frame(dtype, sizes).total_bytes


class FileSink:
    """Writes chunks below `root` into files created at their final size; what such a file holds is kept."""

    def __init__(
        self, root: Path, sizes: Mapping[str, int], archive_dtypes: Mapping[tuple[str, int], str] | None = None
    ) -> None:
        self.root = root
        self._archive_dtypes = archive_dtypes or {}
        self._descriptors: dict[str, int] = {}
        # The kernel lets one writer into a file at a time while others spin. Two that do go on at once, where waking
        # one that sleeps takes as long as a short write: 256 MiB by two took 67 ms, and 75 in turns. More would only
        # burn: eight took four times the processor's time for it.
        self._turns = {file: threading.Semaphore(3) for file in sizes}
        _allow_many_files()
        try:
            for file, size in sizes.items():
                self._create(file, size)
        except BaseException:
            self.close(sync=False)
            raise

    def _create(self, file: str, size: int) -> None:
        path = self.root / file
        try:
            fd = self._descriptors[file] = create(self.root, file)
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, size)
        except OSError as error:
            raise os_failure(error, f"cannot create `{path}` of {size} bytes") from error

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start`."""
        fd, done = self._descriptors[file], 0
        with self._turns[file]:
            while done < len(data):
                try:
                    done += os.pwrite(fd, data[done : done + _SLICE], start + done)
                except OSError as error:
                    raise os_failure(error, f"writing `{self.root / file}` at byte {start + done}") from error

    def data_start(self, chunk: Chunk) -> int:
        """Where a chunk's data begin: behind the archive's prefix."""
        if not chunk.archive_bytes:
            return chunk.start
        return chunk.start + len(frame(self._archive_dtypes[chunk.file, chunk.start], chunk.stored_sizes).prefix)

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Write an archive's prefix and suffix around finished data."""
        if chunk.archive_bytes:
            around = frame(dtype, chunk.stored_sizes)
            self.write(chunk.file, chunk.start, memoryview(around.prefix))
            end = chunk.start + len(around.prefix) + around.data_nbytes
            self.write(chunk.file, end, memoryview(around.suffix(crc32)))

    def sync(self) -> None:
        """Flush everything written so far to the disk, with the folders that name the files."""
        _in_parallel(self._sync, self._descriptors.items())
        for folder in {self.root / Path(file).parent for file in self._descriptors} | {self.root}:
            sync_folder(folder)

    def _sync(self, item: tuple[str, int]) -> None:
        file, fd = item
        try:
            os.fsync(fd)
        except OSError as error:
            raise os_failure(error, f"flushing `{self.root / file}`") from error

    def close(self, *, sync: bool) -> None:
        """Close every file, after flushing it to the disk when `sync` is set."""
        try:
            if sync:
                self.sync()
        finally:
            descriptors, self._descriptors = self._descriptors, {}
            for fd in descriptors.values():
                os.close(fd)


def _in_parallel(action: Callable[[tuple[str, int]], None], items: Iterable[tuple[str, int]]) -> None:
    """Do something to each file, a few at a time: a disk that is asked for one file after another idles between."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(action, list(items)))


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise os_failure(error, f"flushing `{folder}`") from error
