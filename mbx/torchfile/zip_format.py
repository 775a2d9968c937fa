"""The zip records of a torch.save archive: packed and parsed, stored (uncompressed) entries only.

Field layout: PKWARE APPNOTE 6.3.9, sections 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12 (central
directory), 4.3.14 to 4.3.16 (end records) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from converters.errors import StorageError

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
DESCRIPTOR = struct.Struct("<4s3I")
DESCRIPTOR64 = struct.Struct("<4sI2Q")

#: From this size on a record uses zip64 fields: with headers, offsets behind it may pass 4 GiB.
ZIP64_FROM = (1 << 32) - (1 << 16)
MAX_U32 = (1 << 32) - 1
MAX_U16 = (1 << 16) - 1
_MAX_DIRECTORY_BYTES = 1 << 27
_TAIL_BYTES = 4096

#: `read(offset, length)` gives exactly that part of the archive.
Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """One stored record: its name, where its local header starts, its size and CRC-32."""

    name: str
    header_offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _End:
    """Where the central directory lies and what it holds."""

    offset: int
    nbytes: int
    num_entries: int


def read_directory(read: Read, length: int, *, source: str = "archive") -> list[ArchiveEntry]:
    """The records of the archive of `length` bytes that `read` reads, from its central directory.

    Raises StorageError for anything but stored records within bounds.
    """
    end = _find_end(read, length, source)
    if end.nbytes > _MAX_DIRECTORY_BYTES or end.num_entries * CENTRAL.size > end.nbytes:
        raise StorageError(f"{source}: a zip directory of {end.num_entries} records cannot have {end.nbytes} bytes")
    directory = exactly(read, end.offset, end.nbytes, source)
    entries: list[ArchiveEntry] = []
    names: set[str] = set()
    position = 0
    for _ in range(end.num_entries):
        if position + CENTRAL.size > len(directory):
            raise StorageError(f"{source}: the zip directory ends inside record {len(entries)}")
        entry, position = _parse_central(directory, position, source)
        if entry.name in names:
            raise StorageError(f"{source}: the zip directory holds '{entry.name}' twice")
        if entry.header_offset + LOCAL.size + entry.nbytes > end.offset:
            raise StorageError(
                f"{source}: record '{entry.name}' of {entry.nbytes} bytes reaches past the archive's data"
            )
        names.add(entry.name)
        entries.append(entry)
    return entries


def data_offset(read: Read, entry: ArchiveEntry, length: int, *, source: str = "archive") -> int:
    """Where the bytes of a record begin in the archive of `length` bytes, from its local header."""
    header = LOCAL.unpack(exactly(read, entry.header_offset, LOCAL.size, source))
    signature, _, flags, method, *_, name_bytes, extra_bytes = header
    if signature != b"PK\x03\x04" or method != 0 or flags & 1:
        raise StorageError(f"{source}: record '{entry.name}' has no valid local header")
    start: int = entry.header_offset + LOCAL.size + name_bytes + extra_bytes
    if start + entry.nbytes > length:
        raise StorageError(f"{source}: record '{entry.name}' of {entry.nbytes} bytes reaches past the archive")
    return start


def exactly(read: Read, offset: int, nbytes: int, source: str) -> bytes:
    """`nbytes` bytes at `offset`, or StorageError where the file ends before."""
    data = read(offset, nbytes)
    if len(data) != nbytes:
        raise StorageError(f"{source}: expected {nbytes} bytes at byte {offset}, got {len(data)}")
    return data


def _find_end(read: Read, length: int, source: str) -> _End:
    tail_bytes = min(length, _TAIL_BYTES)
    tail = exactly(read, length - tail_bytes, tail_bytes, source)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 and length > tail_bytes:  # behind a long comment
        tail_bytes = min(length, END.size + MAX_U16)
        tail = exactly(read, length - tail_bytes, tail_bytes, source)
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        raise StorageError(
            f"{source}: no zip directory at the end of its {length} bytes",
            hint="the file is cut short, or was not written by torch.save",
        )
    _, disk, first_disk, here, total, nbytes, offset, comment = END.unpack_from(tail, at)
    start = length - tail_bytes + at
    if at + END.size + comment != len(tail):
        raise StorageError(f"{source}: {len(tail) - at - END.size - comment} bytes behind the zip directory's end")
    if MAX_U16 in (here, total) or MAX_U32 in (nbytes, offset):
        place = start - LOCATOR64.size
        if place >= 0:
            signature, _, place, _ = LOCATOR64.unpack(exactly(read, place, LOCATOR64.size, source))
            if signature == b"PK\x06\x07":
                if place + END64.size > start:
                    raise StorageError(f"{source}: the zip64 end record at byte {place} lies outside the archive")
                fields = END64.unpack(exactly(read, place, END64.size, source))
                signature, _, _, _, disk, first_disk, here, total, nbytes, offset = fields
                if signature != b"PK\x06\x06":
                    raise StorageError(f"{source}: no zip64 end record at byte {place}")
                start = place
    if disk or first_disk or here != total or offset + nbytes > start:
        raise StorageError(f"{source}: the zip directory of {nbytes} bytes at byte {offset} lies outside the archive")
    return _End(offset, nbytes, total)


def _parse_central(directory: bytes, position: int, source: str) -> tuple[ArchiveEntry, int]:
    fields = CENTRAL.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes, comment_bytes, disk = fields[:14]
    offset = fields[16]
    if signature != b"PK\x01\x02":
        raise StorageError(f"{source}: a zip directory record without its signature")
    name_at = position + CENTRAL.size
    extra_at = name_at + name_bytes
    end = extra_at + extra_bytes + comment_bytes
    if end > len(directory):
        raise StorageError(f"{source}: the zip directory ends inside a record")
    try:
        name = directory[name_at:extra_at].decode()
    except UnicodeDecodeError as exc:
        raise StorageError(f"{source}: a zip record whose name is not UTF-8") from exc
    if method != 0 or flags & 1:
        kind = "encrypted" if flags & 1 else "compressed"
        raise StorageError(f"{source}: record '{name}' is {kind}; torch.save stores records as they are")
    wide = [value for value in (size, packed, offset) if value == MAX_U32]
    if wide:
        numbers = _zip64_numbers(directory[extra_at : extra_at + extra_bytes], len(wide), source, name)
        size = numbers.pop(0) if size == MAX_U32 else size
        packed = numbers.pop(0) if packed == MAX_U32 else packed
        offset = numbers.pop(0) if offset == MAX_U32 else offset
    if packed != size or disk not in (0, MAX_U16):
        raise StorageError(f"{source}: record '{name}' has {packed} stored bytes for {size}")
    return ArchiveEntry(name, offset, size, crc), end


def _zip64_numbers(extra: bytes, count: int, source: str, name: str) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == 1 and nbytes >= 8 * count and at + 4 + nbytes <= len(extra):
            return list(struct.unpack_from(f"<{count}Q", extra, at + 4))
        at += 4 + nbytes
    raise StorageError(f"{source}: record '{name}' lacks its zip64 sizes")


def pack_local(name: bytes, crc32: int, nbytes: int, pad_to: int, at: int, *, late_crc: bool, zip64: bool) -> bytes:
    """A local header at byte `at`, padded so that its data start at a multiple of `pad_to`.

    With `late_crc` the CRC-32 follows the data in a descriptor. The padding is an extra field "FB", as
    torch writes it.
    """
    extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if zip64 else b""
    gap = -(at + LOCAL.size + len(name) + len(extra) + 4) % pad_to
    extra += struct.pack("<2s H", b"FB", gap) + b"Z" * gap
    size = MAX_U32 if zip64 else 0 if late_crc else nbytes
    flags = 0x808 if late_crc else 0x800
    needed = 45 if zip64 else 20
    crc = 0 if late_crc else crc32
    return LOCAL.pack(b"PK\x03\x04", needed, flags, 0, 0, 0x21, crc, size, size, len(name), len(extra)) + name + extra


def pack_descriptor(crc32: int, nbytes: int, *, zip64: bool) -> bytes:
    """The descriptor behind the data of a record whose CRC-32 was not known before."""
    return (DESCRIPTOR64 if zip64 else DESCRIPTOR).pack(b"PK\x07\x08", crc32, nbytes, nbytes)


def pack_directory(records: list[tuple[bytes, ArchiveEntry, bool]], at: int, *, zip64: bool) -> bytes:
    """The central directory at byte `at` and the end records; a record is (name, entry, late CRC)."""
    parts: list[bytes] = []
    for name, entry, late_crc in records:
        wide = zip64 and late_crc
        extra = struct.pack("<2H2Q", 1, 16, entry.nbytes, entry.nbytes) if wide else b""
        size = MAX_U32 if wide else entry.nbytes
        head = (b"PK\x01\x02", 45 if wide else 20, 45 if wide else 20, 0x808 if late_crc else 0x800, 0, 0, 0x21)
        tail = (entry.crc32, size, size, len(name), len(extra), 0, 0, 0, 0, entry.header_offset)
        parts.append(CENTRAL.pack(*head, *tail) + name + extra)
    directory = b"".join(parts)
    count, end = len(records), at + len(directory)
    if not zip64:
        return directory + END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), at, 0)
    record = END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, len(directory), at)
    locator = LOCATOR64.pack(b"PK\x06\x07", 0, end, 1)
    return directory + record + locator + END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), MAX_U32, 0)
