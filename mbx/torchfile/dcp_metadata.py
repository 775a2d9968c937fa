"""A DCP checkpoint's `.metadata` without torch: which tensors it holds, and where each chunk lies."""

from __future__ import annotations

from dataclasses import dataclass

from converters.errors import StorageError
from converters.tensors import Shape
from mbx.torchfile.pickle_machine import paused_collection, run_pickle
from mbx.torchfile.pickle_plain import load_storage
from mbx.torchfile.pickle_writer import PickleWriter
from mbx.torchfile.pickles import global_finder
from mbx.torchfile.torch_values import TORCH_NAMES, Opaque, TorchDtype

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_MAX_DIMS = 64
_MAX_INT = 1 << 63


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a DCP checkpoint: safetensors dtype name, global shape, and (offsets, sizes) of its chunks."""

    dtype: str
    size: Shape
    chunks: tuple[tuple[Shape, Shape], ...]


@dataclass(frozen=True, slots=True)
class BytesEntry:
    """A pickled object of a DCP checkpoint."""


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """Where one chunk or object lies: `length` bytes at byte `offset` of the file `relative_path`."""

    relative_path: str
    offset: int
    length: int


#: The name and, for a tensor, the chunk's offsets. torch's `index` is a hint that its equality ignores too.
BlobKey = tuple[str, Shape | None]


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """The content of a DCP checkpoint's `.metadata`: what is stored, and where.

    Format: torch.distributed.checkpoint.metadata.Metadata, as FileSystemWriter.finish pickles it.
    """

    state_dict_metadata: dict[str, TensorEntry | BytesEntry]
    storage_data: dict[BlobKey, BlobEntry]


def load_dcp_metadata(data: bytes, *, source: str = ".metadata") -> DcpMetadata:
    """Reads a `.metadata` that torch wrote; planner data is stepped over.

    TensorProperties may come from the sharded-tensor module, as in torch 2.1, and the root may be Megatron
    Core's subclass of Metadata.

    Raises StorageError for a pickle that is not sound, or does not describe a checkpoint.
    """
    with paused_collection():
        root = run_pickle(data, global_finder(unknown="opaque", source=source), load_storage, source=source)
        return _metadata(root, len(data), source)


def dump_dcp_metadata(metadata: DcpMetadata) -> bytes:
    """The `.metadata` that torch unpickles into its `Metadata`; load_dcp_metadata reads it back unchanged.

    Planner data and storage meta are left at None: torch's reader needs neither, and their fields differ
    between releases.
    """
    out = PickleWriter()
    out.reference(_METADATA, "Metadata")
    out.opcodes(b")\x81}(")
    out.string("state_dict_metadata")
    out.opcodes(b"}(")
    for name, entry in metadata.state_dict_metadata.items():
        out.string(name)
        if isinstance(entry, BytesEntry):
            out.reference(_METADATA, "BytesStorageMetadata")
            out.opcodes(b")\x81")
        else:
            _write_tensor_entry(out, entry)
    out.opcodes(b"u")
    out.string("planner_data")
    out.opcodes(b"N")
    out.string("storage_data")
    out.opcodes(b"}(")
    for (name, offset), blob in metadata.storage_data.items():
        out.reference(_METADATA, "MetadataIndex")
        out.opcodes(b")\x81}(")
        out.string("fqn")
        out.string(name)
        out.string("index")
        out.opcodes(b"N")
        if offset is not None:
            out.string("offset")
            _write_size(out, offset)
        out.opcodes(b"ub")
        out.reference(_FILESYSTEM, "_StorageInfo")
        out.opcodes(b")\x81}(")
        out.string("relative_path")
        out.string(blob.relative_path)
        out.string("offset")
        out.integer(blob.offset)
        out.string("length")
        out.integer(blob.length)
        out.opcodes(b"ub")
    out.opcodes(b"u")
    out.string("storage_meta")
    out.opcodes(b"N")
    out.string("version")
    out.string("1.0.0")
    out.opcodes(b"ub")
    return out.finish()


def _metadata(root: object, pickle_bytes: int, source: str) -> DcpMetadata:
    fields = _fields(root, "Metadata", source)
    entries, blobs = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(entries) is not dict or type(blobs) is not dict:
        raise StorageError(f"{source}: state_dict_metadata and storage_data must be dicts")
    # Chunk objects may be shared, so that a small pickle could describe endless chunks: an honest one
    # spends well over one byte on each.
    budget = pickle_bytes
    tensors: dict[str, TensorEntry | BytesEntry] = {}
    for name, entry in entries.items():
        if type(name) is not str:
            raise StorageError(f"{source}: a name in state_dict_metadata is no string")
        if type(entry) is Opaque and entry.class_name == f"{_METADATA}.BytesStorageMetadata":
            tensors[name] = BytesEntry()
            continue
        tensor = _tensor_entry(entry, f"{source}: tensor '{name}'")
        budget -= len(tensor.chunks)
        if budget < 0:
            raise StorageError(f"{source}: tensor '{name}' repeats chunks of other tensors without end")
        tensors[name] = tensor
    storage: dict[BlobKey, BlobEntry] = {}
    for index, info in blobs.items():
        key, blob = _blob(index, info, source)
        if key in storage:
            raise StorageError(f"{source}: storage_data names '{key[0]}' at offset {key[1]} twice")
        storage[key] = blob
    return DcpMetadata(tensors, storage)


def _fields(record: object, kind: str, source: str) -> dict[object, object]:
    """The attributes of a stand-in whose class is called `kind`."""
    if type(record) is not Opaque or record.class_name.rpartition(".")[2].removeprefix("MCore") != kind:
        got = record.class_name if isinstance(record, Opaque) else type(record).__name__
        raise StorageError(f"{source}: expected a {kind}, got {got}")
    if type(record.state) is not dict:
        raise StorageError(f"{source}: a {kind} without its fields")
    return record.state


def _size(value: object, source: str) -> Shape:
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        raise StorageError(f"{source}: expected a size, got {type(value).__name__}")
    for item in value:
        if type(item) is not int or not 0 <= item < _MAX_INT:
            raise StorageError(f"{source}: expected sizes and offsets of 0 and above")
    return value


def _tensor_entry(entry: object, source: str) -> TensorEntry:
    fields = _fields(entry, "TensorStorageMetadata", source)
    properties = fields.get("properties")
    # TensorProperties pickles as the tuple (dtype, layout, requires_grad, memory format, pin_memory).
    state = properties.state if type(properties) is Opaque else None
    dtype = state[0] if type(state) is tuple and state else None
    stored = dtype.stored if type(dtype) is TorchDtype else None
    if stored is None:
        raise StorageError(f"{source} has a dtype that mbx does not store: {_show(dtype)}")
    listed = fields.get("chunks")
    if type(listed) is not list:
        raise StorageError(f"{source} has no list of chunks")
    chunks: list[tuple[Shape, Shape]] = []
    for chunk in listed:
        box = _fields(chunk, "ChunkStorageMetadata", source)
        chunks.append((_size(box.get("offsets"), source), _size(box.get("sizes"), source)))
    return TensorEntry(stored, _size(fields.get("size"), source), tuple(chunks))


def _show(dtype: object) -> str:
    return str(dtype) if isinstance(dtype, str) else type(dtype).__name__


def _blob(index: object, info: object, source: str) -> tuple[BlobKey, BlobEntry]:
    key = _fields(index, "MetadataIndex", source)
    name, offset = key.get("fqn"), key.get("offset")
    if type(name) is not str:
        raise StorageError(f"{source}: storage_data has an entry without a name")
    where = _fields(info, "_StorageInfo", f"{source}: '{name}'")
    path, start, length = where.get("relative_path"), where.get("offset"), where.get("length")
    if where.get("transform_descriptors"):
        raise StorageError(
            f"{source}: '{name}' is stored under a stream transform (compressed or encrypted)",
            hint="save the checkpoint again without storage extensions",
        )
    if type(path) is not str or type(start) is not int or type(length) is not int:
        raise StorageError(f"{source}: '{name}' has no path, offset and length")
    if not (0 <= start < _MAX_INT and 0 <= length < _MAX_INT):
        raise StorageError(f"{source}: '{name}' lies at byte {start} with {length} bytes")
    return (name, None if offset is None else _size(offset, source)), BlobEntry(path, start, length)


def _write_size(out: PickleWriter, size: Shape) -> None:
    out.reference("torch", "Size")
    out.integers(size)
    out.opcodes(b"\x85R")


def _write_tensor_entry(out: PickleWriter, entry: TensorEntry) -> None:
    out.reference(_METADATA, "TensorStorageMetadata")
    out.opcodes(b")\x81}(")
    out.string("properties")
    key = ("TensorProperties", entry.dtype)
    if not out.recall(key):
        out.reference(_METADATA, "TensorProperties")
        out.opcodes(b")\x81(")
        out.reference("torch", TORCH_NAMES[entry.dtype])
        out.reference("torch.serialization", "_get_layout")
        out.string("torch.strided")
        out.opcodes(b"\x85R\x89")
        out.reference(_METADATA, "_MEM_FORMAT_ENCODING")
        out.opcodes(b"K\x00\x85R\x89tb")
        out.remember(key)
    out.string("size")
    _write_size(out, entry.size)
    out.string("chunks")
    out.opcodes(b"](")
    for offsets, sizes in entry.chunks:
        out.reference(_METADATA, "ChunkStorageMetadata")
        out.opcodes(b")\x81}(")
        out.string("offsets")
        _write_size(out, offsets)
        out.string("sizes")
        _write_size(out, sizes)
        out.opcodes(b"ub")
    out.opcodes(b"eub")
