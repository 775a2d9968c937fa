"""A Hugging Face folder: config, side files, tensors; and the layout of a new one.

What a folder held is recorded inside the Megatron Core checkpoint (`hf/mbx_layout.json`: every safetensors
header, byte for byte), so that an export needs no reference folder and gives the same files back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.errors import StorageError
from converters.planning.exporter import HfTensor
from converters.protocols import Source
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats.bin_weights import INDEX as BIN_INDEX
from mbx.formats.bin_weights import has_bin_weights, read_bin_folder, safetensors_name
from mbx.formats.bitsandbytes import with_shapes
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.files import MANIFEST as MANIFEST
from mbx.formats.pipelines import PIPELINE, of_pipeline
from mbx.formats.placement import Order, Placement
from mbx.formats.safetensors import TensorRange, build_header, parse_header, read_header
from mbx.formats.safetensors_folder import SafetensorsFolder, index_beside_bin, read_folder
from mbx.formats.shards import DIFFUSERS_STEM, STEM, place
from mbx.formats.shards import INDEX as INDEX
from mbx.untrusted.names import inside, leads_out
from mbx.untrusted.small_files import INDEX as INDEX_BYTES
from mbx.untrusted.small_files import open_regular, read_json

CONFIG = "config.json"
#: Where ModelOpt says how it quantised a folder whose config.json does not.
QUANT_CONFIG = "hf_quant_config.json"
LAYOUT = "mbx_layout.json"
#: Tensors without a Megatron Core counterpart (buffers Transformers recomputes), kept for a faithful export.
KEPT = "mbx_kept.safetensors"
#: Scales of a quantised source that its values do not tell, kept for an export that encodes again.
SCALES = "mbx_scales.safetensors"
#: The one subfolder with files of a model: chat templates beside the default (Transformers, `save_pretrained`).
TEMPLATES = "additional_chat_templates"
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
        """The folder itself, where it has a config.json or weights; in a pipeline these are of other tools."""
        if (path / PIPELINE).is_file() and not (path / CONFIG).is_file():
            return None
        return path if (path / CONFIG).is_file() or any(path.glob("*.safetensors")) else None

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open a folder; nothing but headers is read."""
        return open_hf(home)

    def place(self, order: Order) -> Placement:
        """Lay out safetensors files."""
        table = order.plan.table
        stem = DIFFUSERS_STEM if table is not None and table.family == "dit" else STEM
        return place(order.plan.drafts, order.recorded, order.max_shard_bytes, stem)


def read_config(folder: Path) -> dict[str, Value]:
    """`config.json` of a folder, with what ModelOpt says of its weights beside it.

    StorageError when it is absent or not a JSON object.
    """
    try:
        config: dict[str, Value] = read_json(folder / CONFIG)
        if (folder / QUANT_CONFIG).is_file() and config.get("quantization_config") is None:
            said = read_json(folder / QUANT_CONFIG).get("quantization")
            config["quantization_config"] = {"quant_method": "modelopt", **(said if isinstance(said, dict) else {})}
        return config
    except FileNotFoundError:
        if (folder / PIPELINE).is_file():
            raise of_pipeline(folder) from None
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
        passed_over, notes = index_beside_bin(path, tensors)
    else:
        weights = read_folder(path)
        tensors, files, passed_over, notes = weights.tensors, weights.files, weights.passed_over, weights.notes
    if (quantization_of(config) or {}).get("quant_method") == "bitsandbytes":
        tensors = with_shapes(path, tensors)
    return Checkpoint(
        path,
        "huggingface",
        "hf",
        path,
        tensors,
        config,
        root=path,
        hf=path,
        weight_files=files,
        passed_over=passed_over,
        notes=notes,
        side_files=tuple(name for name in side_files(path) if name not in passed_over),
    )


def has_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder holds weights, in either format."""
    return any(folder.glob("*.safetensors")) or has_bin_weights(folder)


def side_files(path: Path) -> list[str]:
    """Names of everything in a folder that is not weights: tokenizer, chat templates, code, config.

    Those of TEMPLATES are named with that folder. Links that lead out of theirs are left out: what they lead to is not
    the model's, and would travel with it.
    """
    return sorted(p.relative_to(path).as_posix() for p in _beside(path) if p.is_file() and not leads_out(p))


def not_carried(path: Path) -> dict[str, str]:
    """What `side_files` leaves out by its name, and what each is in words: links out of the folder, pipes, devices."""
    left = {p.relative_to(path).as_posix(): p for p in sorted(_beside(path)) if leads_out(p) or not p.is_file()}
    return {
        name: f"a link that leads out of `{p.parent}`" if leads_out(p) else "no regular file"
        for name, p in left.items()
    }


def _beside(path: Path) -> Iterator[Path]:
    for p in path.iterdir():
        hidden = p.name.startswith(".") or p.name.endswith(_WEIGHT_SUFFIXES)
        if p.name == TEMPLATES and p.is_dir():
            yield from [p] if leads_out(p) else (file for file in p.glob("*.jinja") if not file.is_dir())
        elif not p.is_dir() and not hidden and p.name not in (MANIFEST, LAYOUT, BIN_INDEX):
            yield p


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer, which Megatron-Bridge keeps in a folder of its own."""
    stems = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece", "tekken")
    return name.startswith((*stems, f"{TEMPLATES}/")) or name.endswith((".model", ".tiktoken"))


def record_layout(folder: Checkpoint, changed: Collection[str] = ()) -> str:
    """JSON text that `recorded_layout` reads back: the header of every weight file, byte for byte.

    `pytorch_model.bin` files get the header that they would have as safetensors, under that name, and files with
    tensors that are `changed` against what lies there the header that the folder's tensors make.
    """
    files = []
    for name in folder.weight_files:
        held = [tensor for tensor in folder.tensors.values() if tensor.chunks[0].file == name]
        if not held:
            continue
        if name.endswith(".bin") or name in folder.passed_over or any(tensor.name in changed for tensor in held):
            header = build_header(held, {"format": "pt"})[8:].decode("utf-8")
            files.append({"file": safetensors_name(name), "header": header})
            continue
        with open(open_regular(folder.path / name), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            files.append({"file": name, "header": stream.read(length).decode("utf-8")})
    return json.dumps({"files": files})


def bin_index(folder: Checkpoint) -> bytes | None:
    """The index that a folder of several files has where its own does not serve: once they are no pickles, say."""
    stale = folder.weight_files[0].endswith(".bin") or INDEX in folder.passed_over
    return index_of(folder) if stale else None


def index_of(folder: Checkpoint) -> bytes | None:
    """The index of a folder's tensors over its weight files; None where there is one file."""
    if len(folder.weight_files) < 2:
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
        if not any(folder.glob("*.safetensors")):
            return None
        weights = read_folder(folder)
        return tuple(_weight_file(folder / name, weights) for name in weights.files)
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


def _weight_file(path: Path, weights: SafetensorsFolder) -> WeightFile:
    """A file as it is, or without the copies that the folder's index passes over."""
    header = read_header(path)
    whole = path.name not in weights.passed_over
    held = {n: t for n, t in header.tensors.items() if whole or weights.tensors[n].chunks[0].file == path.name}
    return WeightFile(path.name, header.header_bytes[8:] if whole else None, _in_data_order(held))


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
