"""safetensors files without torch: validated headers, folders of shards, and headers to write.

Format: 8 bytes little-endian header length, a JSON object `name -> {dtype, shape, data_offsets}` with an
optional `__metadata__` of strings, then the data without holes (safetensors/README.md, "Format").
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

from converters.errors import StorageError
from converters.tensors import DTYPE_BITS, Shape, StoredTensor
from mbx.untrusted.names import is_inside
from mbx.untrusted.small_files import open_regular, read_small

#: The library's own limit; checked before anything of that size is read.
MAX_HEADER_BYTES = 100_000_000
#: Missing files that an error names.
_SHOWN = 100
_MAX_DIMS = 64
_MAX_DIM = 1 << 62
_INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

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


@dataclass(frozen=True, slots=True)
class SafetensorsFolder:
    """Every tensor of a folder, the files that hold them (relative names, sorted), and the shards' metadata."""

    path: Path
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]
    metadata: dict[str, str]


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
                raise StorageError(f"{path}: {file_bytes} bytes are too few for a safetensors file")
            header_bytes = int.from_bytes(length, "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise StorageError(
                    f"{path}: a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed",
                    hint="the file is damaged, or is no safetensors file (a Git LFS pointer, say)",
                )
            if 8 + header_bytes > file_bytes:
                raise StorageError(f"{path}: cut short: {8 + header_bytes} bytes of header, {file_bytes} in the file")
            raw = file.read(header_bytes)
    except OSError as exc:
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(raw) != header_bytes:
        raise StorageError(f"{path}: expected a header of {header_bytes} bytes, got {len(raw)}")
    tensors, metadata = parse_header(raw, str(path))
    _check_layout(tensors, file_bytes - 8 - header_bytes, str(path))
    return SafetensorsFile(path, tensors, metadata, 8 + header_bytes, length + raw)


def read_folder(folder: Path) -> SafetensorsFolder:
    """Every tensor of a folder of safetensors files; links are followed.

    Reads the shards of `model.safetensors.index.json` (or the folder's only `*.safetensors.index.json`),
    else `model.safetensors`, else all `*.safetensors`. Raises StorageError for missing shards, for tensors
    that index and shards do not agree on, for a name in two shards, and when there are no weights.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder")
    index = _find_index(folder)
    weight_map = None if index is None else _read_index(index)
    names = _unindexed_shards(folder) if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise StorageError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {missing[0]}",
            hint="download the missing files",
            details=missing,
        )
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    twice: list[str] = []
    for name in names:
        header = read_header(folder / name)
        metadata.update(header.metadata)
        for key, (dtype, shape, start, _) in header.tensors.items():
            if key in tensors:
                twice.append(f"{key}: in {tensors[key].chunks[0].file} and in {name}")
                continue
            tensors[key] = StoredTensor.whole(key, dtype, shape, name, header.data_start + start)
    if twice:
        raise StorageError(f"{folder}: {len(twice)} tensors are in two shards: {twice[0]}", details=twice)
    if index is not None and weight_map is not None:
        _check_index(index, weight_map, tensors)
    if not tensors:
        raise StorageError(f"{folder}: its safetensors files hold no tensors")
    return SafetensorsFolder(folder, tensors, tuple(names), metadata)


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


def _load_json(raw: bytes, source: str) -> dict[str, object]:
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
    header = _load_json(raw, source)
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


def _find_index(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    preferred = folder / f"model{_INDEX_SUFFIX}"
    if preferred in found:
        return preferred
    if len(found) > 1:
        names = [path.name for path in found]
        raise StorageError(f"{folder}: {len(found)} index files and none is {preferred.name}", details=names)
    return found[0] if found else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = read_small(path, MAX_HEADER_BYTES)
    except OSError as exc:
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    given = _load_json(raw, str(path)).get("weight_map")
    if not isinstance(given, dict) or not given:
        raise StorageError(f"{path}: no weight_map")
    weight_map: dict[str, str] = {}
    for tensor, shard in given.items():
        if not isinstance(shard, str) or not is_inside(shard):
            raise StorageError(f"{path}: tensor '{tensor}' must name a file in this folder, got {shard!r}"[:500])
        weight_map[tensor] = shard
    single = path.with_name("model.safetensors")
    if single.is_file() and single.name not in weight_map.values():
        raise StorageError(
            f"{path.parent}: both {single.name} and {path.name} are there, and the index does not name the file",
            hint="remove the one that is out of date",
        )
    return weight_map


def _unindexed_shards(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise StorageError(
            f"{folder}: no safetensors weights", hint="expected model.safetensors or model.safetensors.index.json"
        )
    if "model.safetensors" in names:  # the file Transformers reads; others beside it are adapters and copies
        return ["model.safetensors"]
    sets: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, count), found in sets.items():
        missing = (number for number in range(1, int(count) + 1) if number not in found)
        if (lacks := int(count) - len(found)) > 0:
            shown = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in islice(missing, _SHOWN)]
            raise StorageError(
                f"{folder}: {lacks} of {int(count)} shards are missing: {shown[0]}",
                hint="download the missing files",
                details=shown,
            )
    return names


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    wrong: list[str] = []
    for name, shard in weight_map.items():
        if name not in tensors:
            wrong.append(f"{name}: in the index, in no shard")
        elif tensors[name].chunks[0].file != shard:
            wrong.append(f"{name}: in {tensors[name].chunks[0].file}, the index says {shard}")
    wrong += [f"{n}: in {t.chunks[0].file}, not in the index" for n, t in tensors.items() if n not in weight_map]
    if wrong:
        raise StorageError(f"{path}: {len(wrong)} tensors do not agree with the shards: {wrong[0]}", details=wrong)
