"""A Hugging Face folder: config, side files, tensors; and the layout of a new one.

What a folder held is recorded inside the Megatron Core checkpoint (`hf/mbx_layout.json`: every safetensors
header, byte for byte), so that an export needs no reference folder and gives the same files back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.codecs.decode import decoded_view
from converters.engine.plan import Draft
from converters.errors import StorageError, UsageError
from converters.planning.exporter import HfTensor
from converters.protocols import Source
from converters.rows.expr import Value
from converters.tensors import StoredTensor, nbytes_of
from mbx.formats.bin_weights import INDEX as BIN_INDEX
from mbx.formats.bin_weights import has_bin_weights, read_bin_folder, safetensors_name
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.files import MANIFEST as MANIFEST
from mbx.formats.placement import Order, Placement
from mbx.formats.safetensors import TensorRange, build_header, parse_header, read_folder, read_header
from mbx.untrusted.names import inside, leads_out
from mbx.untrusted.small_files import INDEX as INDEX_BYTES
from mbx.untrusted.small_files import open_regular, read_json

CONFIG = "config.json"
LAYOUT = "mbx_layout.json"
#: Tensors without a Megatron Core counterpart (buffers Transformers recomputes), kept for a faithful export.
KEPT = "mbx_kept.safetensors"
#: Scales of a quantised source that its values do not tell, kept for an export that encodes again.
SCALES = "mbx_scales.safetensors"
INDEX = "model.safetensors.index.json"
_BLOCK = 4 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file as a folder held it: its name, its header's bytes, its tensors in data order.

    `header` is None where the tensors are no longer those of the file, as after decoding.
    """

    name: str
    header: bytes | None
    tensors: Mapping[str, HfTensor]


class HuggingFace:
    """The format of Hugging Face folders: config.json, safetensors or `pytorch_model.bin` weights."""

    name = title = "huggingface"
    spelling: Spelling = "hf"

    def find(self, path: Path) -> Path | None:
        """The folder itself, where it has a config.json or weights."""
        return path if (path / CONFIG).is_file() or any(path.glob("*.safetensors")) else None

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open a folder; nothing but headers is read."""
        return open_hf(home)

    def place(self, order: Order) -> Placement:
        """Lay out safetensors files."""
        return place(order.plan.drafts, order.recorded, order.max_shard_bytes)


def read_config(folder: Path) -> dict[str, Value]:
    """`config.json` of a folder; StorageError when it is absent or not a JSON object."""
    try:
        return read_json(folder / CONFIG)
    except FileNotFoundError:
        raise StorageError(f"`{folder}` has no `{CONFIG}`") from None
    except NotADirectoryError:
        raise StorageError(f"`{folder}` is a file; a Hugging Face folder was expected") from None


def config_file(opened: Checkpoint) -> Mapping[str, Value] | None:
    """The config.json of a checkpoint, its own or that of its hf/ folder; None where it has none."""
    if opened.config:
        return opened.config
    return read_config(opened.hf) if opened.hf is not None and (opened.hf / CONFIG).is_file() else None


def open_hf(path: Path) -> Checkpoint:
    """Open a folder with safetensors weights, or `pytorch_model.bin` ones; nothing but headers is read."""
    config = read_config(path)
    if has_bin_weights(path):
        tensors, files = read_bin_folder(path)
    else:
        weights = read_folder(path)
        tensors, files = weights.tensors, weights.files
    sides = tuple(side_files(path))
    return Checkpoint(
        path, "huggingface", "hf", path, tensors, config, root=path, hf=path, weight_files=files, side_files=sides
    )


def has_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder holds weights, in either format."""
    return any(folder.glob("*.safetensors")) or has_bin_weights(folder)


def side_files(path: Path) -> list[str]:
    """Names of everything in a folder that is not weights: tokenizer, chat template, code, config.

    Links that lead out of it are left out: what they lead to is not the model's, and would travel with it.
    """
    return sorted(p.name for p in _beside(path) if p.is_file() and not leads_out(p))


def not_carried(path: Path) -> dict[str, str]:
    """What `side_files` leaves out by its name, and what each is in words: links out of the folder, pipes, devices."""
    left = {p.name: p for p in sorted(_beside(path)) if leads_out(p) or not p.is_file()}
    return {
        name: f"a link that leads out of `{path}`" if leads_out(p) else "no regular file" for name, p in left.items()
    }


def _beside(path: Path) -> Iterator[Path]:
    for p in path.iterdir():
        hidden = p.name.startswith(".") or p.name.endswith(_WEIGHT_SUFFIXES)
        if not p.is_dir() and not hidden and p.name not in (MANIFEST, LAYOUT, BIN_INDEX):
            yield p


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer, which Megatron-Bridge keeps in a folder of its own."""
    stems = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")
    return name.startswith(stems)


def record_layout(folder: Checkpoint) -> str:
    """JSON text that `recorded_layout` reads back: the header of every weight file, byte for byte.

    `pytorch_model.bin` files get the header that they would have as safetensors, under that name.
    """
    files = []
    for name in folder.weight_files:
        if name.endswith(".bin"):
            held = [tensor for tensor in folder.tensors.values() if tensor.chunks[0].file == name]
            header = build_header(held, {"format": "pt"})[8:].decode("utf-8")
            files.append({"file": safetensors_name(name), "header": header})
            continue
        with open(open_regular(folder.path / name), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            files.append({"file": name, "header": stream.read(length).decode("utf-8")})
    return json.dumps({"files": files})


def bin_index(folder: Checkpoint) -> bytes | None:
    """The index that a folder of several `pytorch_model-*.bin` has once its files are safetensors."""
    if len(folder.weight_files) < 2 or not folder.weight_files[0].endswith(".bin"):
        return None
    total = sum(tensor.nbytes for tensor in folder.tensors.values())
    weight_map = {name: safetensors_name(tensor.chunks[0].file) for name, tensor in sorted(folder.tensors.items())}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def recorded_layout(folder: Path) -> tuple[WeightFile, ...] | None:
    """Weight files that `record_layout` noted in `folder`, or that lie there; None where there are neither.

    StorageError for a damaged layout, and for one that names files outside the folder that an export makes.
    """
    path = folder / LAYOUT
    if not path.is_file():
        return tuple(_weight_file(p) for p in sorted(folder.glob("*.safetensors"))) or None
    try:
        files = read_json(path, INDEX_BYTES)["files"]
        if not isinstance(files, list):
            raise TypeError("`files` is no list")
        out, named = [], set[str]()
        for entry in files:
            header = str(entry["header"]).encode()
            name = inside(entry["file"], f"`{path}`")
            if not name.endswith(".safetensors") or name in named:
                raise StorageError(
                    f"`{path}` names the weight file {name!r}"[:300] + ", twice or under another suffix"
                )
            named.add(name)
            parsed, _ = parse_header(header, f"{path}: {name}")
            out.append(WeightFile(name, header, _in_data_order(parsed)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"`{path}` is damaged: {error}") from error
    return tuple(out)


def decoded_layout(files: tuple[WeightFile, ...], quantization: Mapping[str, object]) -> tuple[WeightFile, ...]:
    """A recorded layout with every set of quantised parts replaced by what they encode, in the first part's file."""
    stored = {n: StoredTensor(n, t.dtype, t.shape, ()) for file in files for n, t in file.tensors.items()}
    view, encoded = decoded_view(stored, quantization)
    first = {next(iter(e.parts.values())).name: name for name, e in encoded.items()}
    out = []
    for file in files:
        names = [first.get(name, name) for name in file.tensors]
        tensors = {n: HfTensor(view[n].dtype, view[n].shape) for n in names if n in view}
        out.append(WeightFile(file.name, file.header if file.tensors == tensors else None, tensors))
    return tuple(out)


def _weight_file(path: Path) -> WeightFile:
    header = read_header(path)
    return WeightFile(path.name, header.header_bytes[8:], _in_data_order(header.tensors))


def _in_data_order(ranges: Mapping[str, TensorRange]) -> dict[str, HfTensor]:
    ordered = sorted(ranges.items(), key=lambda item: item[1][2:])
    return {name: HfTensor(dtype, shape) for name, (dtype, shape, _, _) in ordered}


def pack_kept(tensors: Sequence[StoredTensor], source: Source) -> Iterator[bytes]:
    """A safetensors file of tensors that travel beside the Megatron Core ones, block by block."""
    block = bytearray(build_header(tensors))
    for tensor in tensors:
        (chunk,) = tensor.chunks
        start = source.data_start(chunk)
        for at in range(0, tensor.nbytes, _BLOCK):
            data = bytearray(min(_BLOCK, tensor.nbytes - at))
            source.read_into(chunk.file, start + at, memoryview(data))
            block += data
            if len(block) >= _BLOCK:
                yield bytes(block)
                block.clear()
    yield bytes(block)


def packed_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Size of the file that `pack_kept` makes."""
    return len(build_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


def kept_tensors(iteration: Path, reference: Path) -> dict[str, StoredTensor]:
    """What `pack_kept` wrote as KEPT into `reference`, files named from `iteration`; empty where there is nothing."""
    return _tensors_of(reference / KEPT, iteration)


def known_parts(iteration: Path, reference: Path) -> dict[str, StoredTensor]:
    """Tensors of a quantised source as it stored them, files named from `iteration`.

    `reference` holds the SCALES of an import, or is the source's own folder, weights and all.
    """
    if (reference / SCALES).is_file() or (reference / LAYOUT).is_file():
        return _tensors_of(reference / SCALES, iteration)
    return {n: t for path in sorted(reference.glob("*.safetensors")) for n, t in _tensors_of(path, iteration).items()}


def _tensors_of(path: Path, iteration: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        return {}
    name = os.path.relpath(path, iteration)
    header = read_header(path)
    return {
        key: StoredTensor.whole(key, dtype, shape, name, header.data_start + start)
        for key, (dtype, shape, start, _) in header.tensors.items()
    }


def place(drafts: Iterable[Draft], recorded: tuple[WeightFile, ...] | None, max_shard_bytes: int) -> Placement:
    """Lay out safetensors files: the recorded ones where the names still fit, else shards of a bounded size."""
    by_name = {draft.name: draft for draft in drafts}
    if recorded is not None and {n for f in recorded for n in f.tensors} >= set(by_name):
        groups: list[tuple[str, list[Draft], WeightFile | None]]
        groups = [(f.name, [by_name[n] for n in f.tensors if n in by_name], f) for f in recorded]
        groups = [group for group in groups if group[1]]
        whole = all(f.header is not None for f in recorded)
        same = whole and {n for f in recorded for n in f.tensors} == set(by_name)
    else:
        shards = _shards(list(by_name.values()), max_shard_bytes)
        groups = [(name, members, None) for name, members in shards]
        same = False
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for name, members, old in groups:
        described = [(d.name, d.dtype, d.shape) for d in members]
        unchanged = old is not None and [(n, t.dtype, t.shape) for n, t in old.tensors.items()] == described
        if old is not None and old.header is not None and unchanged:
            header = len(old.header).to_bytes(8, "little") + old.header
        else:
            header = build_header([StoredTensor(*parts, ()) for parts in described], {"format": "pt"})
        at = len(header)
        for draft in members:
            tensors[draft.name] = StoredTensor.whole(draft.name, draft.dtype, draft.shape, name, at)
            at += tensors[draft.name].nbytes
        headers[name], sizes[name] = header, at
    texts = {}
    if len(groups) > 1 and not same:
        total = sum(nbytes_of(d.dtype, d.shape) for d in by_name.values())
        weight_map = {d.name: name for name, members, _ in groups for d in members}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return Placement(tensors, sizes, headers=headers, texts=texts)


def _shards(drafts: list[Draft], max_bytes: int) -> list[tuple[str, list[Draft]]]:
    if max_bytes < 1:
        raise UsageError(f"a shard cannot be {max_bytes} bytes")
    shards: list[list[Draft]] = [[]]
    room = max_bytes
    for draft in drafts:
        nbytes = nbytes_of(draft.dtype, draft.shape)
        if shards[-1] and nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(draft)
        room -= nbytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    count = len(shards)
    return [(f"model-{n:05d}-of-{count:05d}.safetensors", shard) for n, shard in enumerate(shards, 1)]
