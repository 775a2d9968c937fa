"""A torch.save archive of many tensors whose data are written in place, by others, before its headers.

The object and every size are known beforehand, so every byte has its place before any tensor is read. Only
the CRC-32 of each storage comes last; `frames` gives what surrounds the data once they are known.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.checksums import crc32
from mbx.torchfile.pickles import dump_plain
from mbx.torchfile.zip_format import (
    CENTRAL,
    END,
    END64,
    LOCATOR64,
    MAX_U16,
    MAX_U32,
    ZIP64_FROM,
    ArchiveEntry,
    pack_local,
)

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class ArchiveLayout:
    """Places of an archive's parts: `starts[i]` is the first byte of storage `i`, `total_bytes` the file's size."""

    folder: str
    records: tuple[tuple[str, bytes], ...]
    sizes: tuple[int, ...]
    headers: tuple[int, ...]
    starts: tuple[int, ...]
    total_bytes: int

    def frames(self, crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """(byte offset, bytes) of everything but the data; `crcs[i]` is the CRC-32 of storage `i`."""
        entries, at = [], 0
        for short, content in self.records:
            name, crc = f"{self.folder}/{short}", crc32(content)
            header = pack_local(name.encode(), crc, len(content), 1, at, late_crc=False, zip64=False)
            yield at, header + content
            entries.append(ArchiveEntry(name, at, len(content), crc))
            at += len(header) + len(content)
        for number, (size, at) in enumerate(zip(self.sizes, self.headers, strict=True)):
            name = f"{self.folder}/data/{number}"
            yield at, _header(name, crcs[number], size, at)
            entries.append(ArchiveEntry(name, at, size, crcs[number]))
        end = self.starts[-1] + self.sizes[-1] if self.sizes else at
        yield end, pack_wide_directory(entries, end)


def lay_out(value: object, sizes: Sequence[int], folder: str) -> ArchiveLayout:
    """The layout of `value`, whose TensorStubs refer to storages "0", "1", … of `sizes` bytes.

    `folder` names the archive's own folder; torch.save takes the file's stem. Raises as `dump_plain` does.
    """
    records = (
        ("data.pkl", dump_plain(value)),
        (".format_version", b"1"),
        (".storage_alignment", str(_ALIGNMENT).encode()),
        ("byteorder", b"little"),
        ("version", b"3\n"),
    )
    at = 0
    for short, content in records:
        at += len(pack_local(f"{folder}/{short}".encode(), 0, len(content), 1, at, late_crc=False, zip64=False))
        at += len(content)
    headers, starts, entries = [], [], []
    for number, size in enumerate(sizes):
        name = f"{folder}/data/{number}"
        headers.append(at)
        entries.append(ArchiveEntry(name, at, size, 0))
        at += len(_header(name, 0, size, at))
        starts.append(at)
        at += size
    plain = [ArchiveEntry(f"{folder}/{short}", 0, len(content), 0) for short, content in records]
    total = at + len(pack_wide_directory([*plain, *entries], at))
    return ArchiveLayout(folder, records, tuple(sizes), tuple(headers), tuple(starts), total)


def _header(name: str, crc32: int, nbytes: int, at: int) -> bytes:
    wide = nbytes >= ZIP64_FROM
    return pack_local(name.encode(), crc32, nbytes, _ALIGNMENT, at, late_crc=False, zip64=wide)


def pack_wide_directory(entries: Sequence[ArchiveEntry], at: int) -> bytes:
    """The central directory at byte `at` and the end records, with 64-bit fields only where they are needed.

    PKWARE APPNOTE 6.3.9: a zip64 extra field (4.5.3) holds, in order, those of size, packed size and header
    offset that their 32-bit fields cannot.
    """
    parts: list[bytes] = []
    for entry in entries:
        wide_size, wide_offset = entry.nbytes >= ZIP64_FROM, entry.header_offset >= MAX_U32
        numbers = [entry.nbytes] * 2 * wide_size + [entry.header_offset] * wide_offset
        extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
        version = 45 if numbers else 20
        size = MAX_U32 if wide_size else entry.nbytes
        name = entry.name.encode()
        head = (b"PK\x01\x02", version, version, 0x800, 0, 0, 0x21, entry.crc32, size, size, len(name), len(extra))
        parts.append(CENTRAL.pack(*head, 0, 0, 0, 0, MAX_U32 if wide_offset else entry.header_offset) + name + extra)
    directory = b"".join(parts)
    count, end = len(entries), at + len(directory)
    if count < MAX_U16 and end < MAX_U32:
        return directory + END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), at, 0)
    record = END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, len(directory), at)
    locator = LOCATOR64.pack(b"PK\x06\x07", 0, end, 1)
    short = min(count, MAX_U16)
    size, offset = min(len(directory), MAX_U32), min(at, MAX_U32)
    return directory + record + locator + END.pack(b"PK\x05\x06", 0, 0, short, short, size, offset, 0)
