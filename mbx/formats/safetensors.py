"""safetensors files without torch: validated headers, and headers to write.

Format: 8 bytes little-endian header length, a JSON object `name -> {dtype, shape, data_offsets}` with an
optional `__metadata__` of strings, then the data without holes (safetensors/README.md, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from converters.errors import StorageError
from converters.tensors import DTYPE_BITS, Shape, StoredTensor
from mbx.untrusted.small_files import open_regular
from mbx.untrusted.stand_ins import stand_in

#: The library's own limit; checked before anything of that size is read.
MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 64
_MAX_DIM = 1 << 62

#: dtype, shape, and first and last byte (exclusive) of the data, counted from `data_start`.
TensorRange = tuple[str, Shape, int, int]


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The validated header of one file; tensors in the header's order, their data from byte `data_start` on."""

    path: Path
    tensors: dict[str, TensorRange]
    metadata: dict[str, str]
    data_start: int
    header_bytes: bytes


def read_header(path: Path) -> SafetensorsFile:
    """Reads and validates the header of one file.

    Raises StorageError, naming file and tensor, for a file that is cut short or too long, a header that is
    not valid, an unknown dtype, and data that overlap, leave a hole or do not fit the shape.
    """
    try:
        with open(open_regular(path), "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = file.read(8)
            if len(length) < 8:
                raise stand_in(path) or StorageError(f"{path}: {file_bytes} bytes are too few for a safetensors file")
            header_bytes = int.from_bytes(length, "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise stand_in(path) or StorageError(
                    f"{path}: a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed",
                    hint="the file is damaged, or is no safetensors file",
                )
            if 8 + header_bytes > file_bytes:
                raise StorageError(f"{path}: cut short: {8 + header_bytes} bytes of header, {file_bytes} in the file")
            raw = file.read(header_bytes)
    except OSError as exc:
        raise stand_in(path) or StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(raw) != header_bytes:
        raise StorageError(f"{path}: expected a header of {header_bytes} bytes, got {len(raw)}")
    tensors, metadata = parse_header(raw, str(path))
    _check_layout(tensors, file_bytes - 8 - header_bytes, str(path))
    return SafetensorsFile(path, tensors, metadata, 8 + header_bytes, length + raw)


def build_header(tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the data of a file that holds whole `tensors` in this order, a multiple of 8 long.

    Raises StorageError for a repeated name and for a header beyond 100 MB.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        if tensor.name in header or tensor.name == "__metadata__":
            raise StorageError(f"the tensor name '{tensor.name}' cannot stand in one safetensors file twice")
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise StorageError(
            f"a safetensors header of {len(raw)} bytes; at most {MAX_HEADER_BYTES} are allowed",
            hint="write the tensors to more than one file",
        )
    return len(raw).to_bytes(8, "little") + raw


def load_json(raw: bytes, source: str) -> dict[str, object]:
    """A JSON object; duplicate keys, at any depth, are refused."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise StorageError(f"{source}: the JSON key '{key}' stands there twice")
                seen.add(key)
        return found

    try:
        loaded = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise StorageError(f"{source}: not valid JSON: {exc}") from exc
    if not isinstance(loaded, dict):
        raise StorageError(f"{source}: expected a JSON object, got {type(loaded).__name__}")
    try:
        "".join(loaded).encode()
    except UnicodeEncodeError as exc:
        raise StorageError(f"{source}: a name that is not valid Unicode") from exc
    return loaded


def parse_header(raw: bytes, source: str) -> tuple[dict[str, TensorRange], dict[str, str]]:
    """Tensors and metadata of a header's JSON, each entry valid in itself; else StorageError naming `source`."""
    header = load_json(raw, source)
    given = header.pop("__metadata__", {})
    if not isinstance(given, dict):
        raise StorageError(f"{source}: __metadata__ must be an object of strings")
    metadata: dict[str, str] = {}
    for key, text in given.items():
        if not isinstance(text, str):
            raise StorageError(f"{source}: __metadata__ entry '{key}' must be a string")
        metadata[key] = text
    return {name: _parse_entry(name, entry, source) for name, entry in header.items()}, metadata


def _parse_entry(name: str, entry: object, source: str) -> TensorRange:
    def refuse(what: str) -> NoReturn:
        raise StorageError(f"{source}: tensor '{name}' {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(f"has an unknown dtype {dtype if isinstance(dtype, str) else type(dtype).__name__!r}")
    if type(shape) is not list or len(shape) > _MAX_DIMS:
        refuse(f"must have a shape of at most {_MAX_DIMS} sizes")
    for size in shape:
        if type(size) is not int or not 0 <= size < _MAX_DIM:
            refuse("has a shape of anything but sizes of 0 and above")
    if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        refuse("must have two data_offsets")
    start, end = offsets
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if not 0 <= start <= end < _MAX_DIM or end - start != nbytes:
        refuse(f"of {dtype} {shape} needs {nbytes} bytes, but lies at {start} to {end}"[:500])
    return dtype, tuple(shape), start, end


def _check_layout(tensors: dict[str, TensorRange], data_bytes: int, source: str) -> None:
    """The ranges follow one another from 0 to the end of the file, without overlap or hole."""
    position = 0
    for start, end, name in sorted([(entry[2], entry[3], name) for name, entry in tensors.items()]):
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise StorageError(f"{source}: tensor '{name}' at {start} {what}, which ends at {position}")
        position = end
        if end > data_bytes:
            raise StorageError(
                f"{source}: cut short: tensor '{name}' ends at byte {end} of the data, which have {data_bytes}",
                hint="download the file again",
            )
    if position != data_bytes:
        raise StorageError(f"{source}: {data_bytes - position} bytes behind the last tensor belong to none")
