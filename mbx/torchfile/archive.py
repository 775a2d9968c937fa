"""torch.save archives without torch: find a tensor's bytes in one, or frame raw bytes as one.

An archive is a zip file of stored records under one folder: `data.pkl` (the object, with references to
storages), `data/<key>` (a storage's raw bytes), `byteorder` and `version`. Layout: torch/serialization.py
and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.checksums import crc32
from converters.errors import StorageError
from converters.tensors import Shape, nbytes_of
from mbx.torchfile.pickle_machine import MAX_PICKLE_BYTES
from mbx.torchfile.pickles import Unknown, dump_plain, load_plain
from mbx.torchfile.torch_values import Namespace, Opaque, TensorStub, row_major
from mbx.torchfile.zip_format import (
    ZIP64_FROM,
    ArchiveEntry,
    Read,
    data_offset,
    exactly,
    pack_descriptor,
    pack_directory,
    pack_local,
    read_directory,
)
from mbx.untrusted.small_files import open_regular

__all__ = [
    "ArchiveEntry",
    "ArchiveFrame",
    "TensorLocation",
    "extra_state_archive",
    "file_reader",
    "load_archive",
    "locate_tensor",
    "object_archive",
    "read_directory",
    "read_object",
    "tensor_archive",
]

#: torch aligns storages to 64 bytes, so that they may be mapped.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where in an archive a tensor's row-major bytes lie: `nbytes` bytes at byte `data_offset`."""

    data_offset: int
    nbytes: int
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class ArchiveFrame:
    """The bytes around `data_nbytes` raw bytes that make them an archive: `prefix | data | suffix(crc)`.

    The data start at a multiple of 64 bytes from the archive's start. `total_bytes` is known before the
    data; their CRC-32 stands in the suffix only.
    """

    prefix: bytes
    data_nbytes: int
    entries: tuple[ArchiveEntry, ...]
    zip64: bool

    def suffix(self, crc32: int) -> bytes:
        """What follows the data, whose CRC-32 (as zlib computes it) is `crc32`."""
        descriptor = pack_descriptor(crc32, self.data_nbytes, zip64=self.zip64)
        records = [(entry.name.encode(), entry, False) for entry in self.entries[:-1]]
        last = self.entries[-1]
        data = ArchiveEntry(last.name, last.header_offset, last.nbytes, crc32)
        at = len(self.prefix) + self.data_nbytes + len(descriptor)
        directory = pack_directory([*records, (data.name.encode(), data, True)], at, zip64=self.zip64)
        return descriptor + directory

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole archive."""
        return len(self.prefix) + self.data_nbytes + len(self.suffix(0))


def file_reader(fd: int, start: int = 0) -> Read:
    """Reads an archive that begins at byte `start` of the open file `fd`; the caller keeps `fd` open."""

    def read(offset: int, length: int) -> bytes:
        return os.pread(fd, length, start + offset)

    return read


def read_object(
    read: Read, length: int, *, unknown: Unknown = "refuse", source: str = "archive"
) -> tuple[object, dict[str, tuple[int, int]]]:
    """The object of an archive of `length` bytes, with TensorStubs, and (offset, bytes) of each storage.

    Raises StorageError for an archive that is not sound, is big-endian, or (unless `unknown="opaque"`)
    names a class that is not known.
    """
    entries = {entry.name: entry for entry in read_directory(read, length, source=source)}
    folder = _folder(entries, source)
    order = entries.get(f"{folder}byteorder")
    if order is not None and _content(read, order, length, 64, source) != b"little":
        raise StorageError(f"{source}: its storages are not little-endian")
    pickled = _content(read, entries[f"{folder}data.pkl"], length, MAX_PICKLE_BYTES, source)
    loaded = load_plain(pickled, unknown=unknown, source=source)
    prefix = f"{folder}data/"
    storages = {
        name[len(prefix) :]: (data_offset(read, entry, length, source=source), entry.nbytes)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    for stub in _tensors(loaded):
        if stub.storage not in storages:
            raise StorageError(f"{source}: a tensor's storage '{stub.storage}' is not in the archive")
        held = storages[stub.storage][1]
        if stub.end_nbytes > held or stub.storage_nbytes > held:
            raise StorageError(f"{source}: a tensor needs {stub.end_nbytes} bytes of a storage that has {held}")
    return loaded, storages


def load_archive(path: Path, *, unknown: Unknown = "refuse") -> tuple[object, dict[str, tuple[int, int]]]:
    """The object in a `.pt` file, with TensorStubs, and (byte offset in the file, bytes) of each storage.

    Raises StorageError when the file cannot be read or is not a sound torch.save archive.
    """
    try:
        fd = open_regular(path)
    except IsADirectoryError as exc:
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    except OSError as exc:
        raise StorageError(f"{path}: cannot be opened: {exc.strerror}") from exc
    try:
        return read_object(file_reader(fd), os.fstat(fd).st_size, unknown=unknown, source=str(path))
    except OSError as exc:
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    finally:
        os.close(fd)


def locate_tensor(read: Read, length: int, *, source: str = "archive") -> TensorLocation:
    """Where the bytes of the one tensor in an archive lie; a view at an offset is resolved.

    Raises StorageError for an archive of something else, and for a tensor that is not row-major, which has
    no contiguous bytes to point at.
    """
    loaded, storages = read_object(read, length, source=source)
    if not isinstance(loaded, TensorStub):
        raise StorageError(f"{source}: expected a tensor, got {type(loaded).__name__}")
    if not loaded.is_contiguous:
        raise StorageError(f"{source}: a tensor of shape {loaded.shape} has strides {loaded.stride}, not row-major")
    start = storages[loaded.storage][0] + loaded.storage_offset * loaded.itemsize
    return TensorLocation(start, nbytes_of(loaded.dtype, loaded.shape), loaded.dtype, loaded.shape)


def tensor_archive(dtype: str, shape: Shape, *, zip64: bool | None = None) -> ArchiveFrame:
    """The frame that makes the raw row-major bytes of one tensor an archive that torch.load reads.

    `zip64` forces or forbids 64-bit sizes; None takes them from 4 GiB less 64 KiB on.
    """
    nbytes = nbytes_of(dtype, shape)
    return _frame(TensorStub(dtype, shape, "0", 0, row_major(shape), nbytes), nbytes, zip64)


def object_archive(value: object) -> bytes:
    """An archive of plain values (see dump_plain), such as `common.pt`; it holds no tensor data."""
    if next(_tensors(value), None) is not None:
        raise StorageError("tensors cannot be written with an archive of plain values")
    records = {"data.pkl": dump_plain(value), **_SIDE_RECORDS}
    body, entries = _pack_records(records)
    return body + pack_directory([(entry.name.encode(), entry, False) for entry in entries], len(body), zip64=False)


def extra_state_archive() -> bytes:
    """The payload of a `_extra_state` object as Megatron Core writes it: a list of one empty uint8 tensor."""
    frame = _frame([TensorStub("U8", (0,), "0", 0, (1,), 0)], 0, None)
    return frame.prefix + frame.suffix(0)


_SIDE_RECORDS = {
    ".format_version": b"1",
    ".storage_alignment": str(ALIGNMENT).encode(),
    "byteorder": b"little",
    "version": b"3\n",
}


def _frame(value: object, nbytes: int, zip64: bool | None) -> ArchiveFrame:
    # The data come last, so that every header offset fits 32 bits whatever their size.
    wide = nbytes >= ZIP64_FROM if zip64 is None else zip64
    body, entries = _pack_records({"data.pkl": dump_plain(value), **_SIDE_RECORDS})
    name = "archive/data/0"
    header = pack_local(name.encode(), 0, nbytes, ALIGNMENT, len(body), late_crc=True, zip64=wide)
    entry = ArchiveEntry(name, len(body), nbytes, 0)
    return ArchiveFrame(body + header, nbytes, (*entries, entry), wide)


def _pack_records(records: dict[str, bytes]) -> tuple[bytes, list[ArchiveEntry]]:
    body = bytearray()
    entries: list[ArchiveEntry] = []
    for short, content in records.items():
        name = f"archive/{short}"
        crc = crc32(content)
        entries.append(ArchiveEntry(name, len(body), len(content), crc))
        body += pack_local(name.encode(), crc, len(content), 1, len(body), late_crc=False, zip64=False)
        body += content
    return bytes(body), entries


def _folder(entries: dict[str, ArchiveEntry], source: str) -> str:
    for name in entries:
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return name.removesuffix("data.pkl")
    raise StorageError(f"{source}: no data.pkl in the archive", hint="the file was not written by torch.save")


def _content(read: Read, entry: ArchiveEntry, length: int, limit: int, source: str) -> bytes:
    if entry.nbytes > limit:
        raise StorageError(f"{source}: record '{entry.name}' has {entry.nbytes} bytes; at most {limit} are read")
    return exactly(read, data_offset(read, entry, length, source=source), entry.nbytes, source)


def _tensors(value: object) -> Iterator[TensorStub]:
    """Every tensor within a value; shared and cyclic parts are entered once."""
    pending: list[object] = [value]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, TensorStub):
            yield item
        elif isinstance(item, (dict, list, tuple, Namespace, Opaque)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                pending.extend(item.values())
            elif isinstance(item, Namespace):
                pending.extend(item.values.values())
            elif isinstance(item, Opaque):
                pending.extend((item.args, item.state, item.items))
            else:
                pending.extend(item)
