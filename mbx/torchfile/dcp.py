"""torch.distributed.checkpoint folders without torch: what they hold, from `.metadata` alone, and its inverse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.errors import StorageError
from converters.tensors import Chunk, StoredTensor, nbytes_of
from mbx.torchfile.dcp_metadata import (
    BlobEntry,
    BlobKey,
    BytesEntry,
    DcpMetadata,
    TensorEntry,
    dump_dcp_metadata,
    load_dcp_metadata,
)
from mbx.torchfile.pickle_machine import MAX_PICKLE_BYTES
from mbx.torchfile.tiling import Box, tiling_fault
from mbx.untrusted.names import is_inside
from mbx.untrusted.small_files import read_small

METADATA_NAME = ".metadata"

#: File (relative to the checkpoint's folder), byte offset and length of a stored object's archive.
StoredObject = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class DcpCheckpoint:
    """A DCP folder: its tensors by name, its pickled objects by name, and its files (relative, sorted)."""

    path: Path
    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]
    files: tuple[str, ...]


def read_dcp(folder: Path) -> DcpCheckpoint:
    """Reads a DCP folder's `.metadata` and checks that it describes whole tensors in files that are there.

    Raises StorageError, naming file and tensor, when chunks leave a hole or overlap, when one has no data,
    when data lie outside their file or in another's place, and for paths that leave the folder.
    """
    metadata = read_index(folder)
    path = folder / METADATA_NAME
    files = _check_blobs(folder, metadata.storage_data, str(path))
    unclaimed = dict(metadata.storage_data)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredObject] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorEntry):
            tensors[name] = _tensor(name, entry, unclaimed, str(path))
        else:
            blob = unclaimed.pop((name, None), None)
            if blob is None:
                raise StorageError(f"{path}: object '{name}' has no data")
            objects[name] = (blob.relative_path, blob.offset, blob.length)
    if unclaimed:
        names = [f"{name} at {offset}" for name, offset in unclaimed]
        raise StorageError(f"{path}: {len(names)} stored chunks belong to no tensor: {names[0]}", details=names)
    return DcpCheckpoint(folder, tensors, objects, files)


def read_index(folder: Path) -> DcpMetadata:
    """A DCP folder's `.metadata` as it stands; nothing that it names is run. StorageError where it cannot be read."""
    path = folder / METADATA_NAME
    try:
        raw = read_small(path, MAX_PICKLE_BYTES)
    except FileNotFoundError as exc:
        raise StorageError(
            f"{folder}: no {METADATA_NAME}", hint="name the checkpoint's iteration folder, such as iter_0000000"
        ) from exc
    except OSError as exc:
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    return load_dcp_metadata(raw, source=str(path))


def build_dcp_metadata(tensors: Iterable[StoredTensor], objects: Mapping[str, StoredObject]) -> bytes:
    """The `.metadata` of a folder that holds `tensors`, each chunk as an archive, and `objects`.

    read_dcp of the result gives them back. Raises StorageError for a name given twice, a chunk without an
    archive, and chunks that do not tile their tensor.
    """
    entries: dict[str, TensorEntry | BytesEntry] = {}
    storage: dict[BlobKey, BlobEntry] = {}
    for tensor in tensors:
        if tensor.name in entries:
            raise StorageError(f"tensor '{tensor.name}' cannot stand in one checkpoint twice")
        chunks = tuple((chunk.offsets, chunk.sizes) for chunk in tensor.chunks)
        entry = TensorEntry(tensor.dtype, tensor.shape, chunks)
        _check_tiling(entry, f"tensor '{tensor.name}'")
        entries[tensor.name] = entry
        for chunk in tensor.chunks:
            if not chunk.archive_bytes:
                raise StorageError(f"tensor '{tensor.name}' at {chunk.offsets} is not framed as an archive")
            blob = BlobEntry(chunk.file, chunk.start, chunk.archive_bytes)
            storage[(tensor.name, chunk.offsets)] = blob
    for name, (file, start, length) in objects.items():
        if name in entries:
            raise StorageError(f"object '{name}' cannot stand in one checkpoint twice")
        entries[name] = BytesEntry()
        storage[(name, None)] = BlobEntry(file, start, length)
    return dump_dcp_metadata(DcpMetadata(entries, storage))


def _check_blobs(folder: Path, storage: Mapping[BlobKey, BlobEntry], source: str) -> tuple[str, ...]:
    """Every blob lies in a file of the folder, within its size, and apart from every other."""
    by_file: dict[str, list[tuple[int, int, str]]] = {}
    for (name, _), blob in storage.items():
        by_file.setdefault(blob.relative_path, []).append((blob.offset, blob.length, name))
    for file, blobs in by_file.items():
        if not is_inside(file):
            raise StorageError(f"{source}: '{blobs[0][2]}' lies in '{file}', outside the checkpoint")
        try:
            size = (folder / file).stat().st_size
        except OSError as exc:
            raise StorageError(f"{folder / file}: {len(blobs)} chunks lie in it, but: {exc.strerror}") from exc
        blobs.sort()
        position = 0
        for offset, length, name in blobs:
            if offset < position:
                raise StorageError(f"{source}: '{name}' at byte {offset} of {file} overlaps what ends at {position}")
            position = offset + length
            if position > size:
                raise StorageError(
                    f"{folder / file}: cut short: '{name}' ends at byte {position}, the file has {size}",
                    hint="copy the file again",
                )
    return tuple(sorted(by_file))


def _tensor(name: str, entry: TensorEntry, unclaimed: dict[BlobKey, BlobEntry], source: str) -> StoredTensor:
    _check_tiling(entry, f"{source}: tensor '{name}'")
    chunks: list[Chunk] = []
    for offsets, sizes in entry.chunks:
        blob = unclaimed.pop((name, offsets), None)
        if blob is None and len(entry.chunks) == 1:  # a whole tensor may be stored without an offset
            blob = unclaimed.pop((name, None), None)
        if blob is None:
            raise StorageError(f"{source}: tensor '{name}' at {offsets} has no data")
        if 0 in sizes and 0 not in entry.size:  # a rank that held no rows; it adds nothing
            continue
        if blob.length <= nbytes_of(entry.dtype, sizes):
            raise StorageError(
                f"{source}: tensor '{name}' at {offsets} needs {nbytes_of(entry.dtype, sizes)} bytes"
                f" and an archive around them, got {blob.length}"
            )
        chunks.append(Chunk(offsets, sizes, blob.relative_path, blob.offset, blob.length))
    return StoredTensor(name, entry.dtype, entry.size, tuple(chunks))


def _check_tiling(entry: TensorEntry, source: str) -> None:
    boxes: list[Box] = []
    for offsets, sizes in entry.chunks:
        if len(offsets) != len(entry.size) or len(sizes) != len(entry.size):
            raise StorageError(f"{source}: of shape {entry.size}, has a chunk at {offsets} of {sizes}")
        if any(at + size > full for at, size, full in zip(offsets, sizes, entry.size, strict=True)):
            raise StorageError(f"{source}: of shape {entry.size}, does not hold the chunk at {offsets} of {sizes}")
        if 0 not in sizes:
            boxes.append((offsets, sizes))
    fault = tiling_fault(entry.size, boxes) if math.prod(entry.size) or boxes else None
    if fault is not None:
        raise StorageError(f"{source}: of shape {entry.size}, {fault}")
