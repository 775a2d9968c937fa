"""What a folder is and holds, whole or damaged, from headers alone: what `mbx inspect` says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import MbxError, StorageError, UnsupportedError
from converters.mcore.flavours import TEXT_ALONE, arranged
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.adapter_facts import AdapterFacts, describe
from mbx.formats.architecture import architecture_of
from mbx.formats.beside import with_config
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.prediction import lie_beside
from mbx.formats.registry import Sniffed, sniff
from mbx.formats.safetensors_folder import read_folder
from mbx.formats.torch_dist import count_by, is_weight
from mbx.tables import table_for
from mbx.torchfile.dcp import METADATA_NAME, read_dcp

#: What is said of prediction layers that the source had and the model has not.
AHEAD = "prediction layers"
#: What names of whole models begin with, before a module's own (`thinker` is the part of an Omni model that answers).
_CONTAINERS = re.compile(r"^(model\.|thinker\.)+")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's header, how many chunks it has along each dimension, and the files they lie in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    grid: tuple[int, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a checkpoint is. `fault` says what is missing or damaged; None means whole.

    `tensors` are the model's weights; `other_state` counts the rest by kind, as (tensors, bytes). `files` holds the
    data files with their sizes, `layout` the parallel sizes as far as they show. `flavour` is the tool whose keys the
    towers of a Megatron checkpoint have, for a model with any; `towers` counts the tensors of each by the way its
    names begin, `kept` those that travel beside the model in hf/, prediction layers that it was built without among
    them. `adapter` is set where the tensors are those of an adapter.
    """

    path: Path
    format: str
    writer: str | None = None
    core: str | None = None
    model_class: str | None = None
    fault: str | None = None
    iteration: int | None = None
    architecture: str | None = None
    table: str | None = None
    flavour: str | None = None
    towers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    layout: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    other_state: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    num_objects: int = 0
    files: Mapping[str, int] = field(default_factory=dict)
    side_files: tuple[str, ...] = ()
    adapter: AdapterFacts | None = None

    @property
    def num_tensors(self) -> int:
        """Tensors of the model."""
        return len(self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of the model's tensors, padding and buffers included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_chunks(self) -> int:
        """Stored chunks of the model's tensors."""
        return sum(math.prod(tensor.grid) for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, tuple[int, int]]:
        """(tensors, bytes) by dtype."""
        return count_by((tensor.dtype, tensor.nbytes) for tensor in self.tensors)


def summarize(path: Path, hf_config: Path | None = None) -> Summary:
    """Find out what `path` is; StorageError for a path that is no checkpoint at all.

    `hf_config` is a folder with config.json for a Megatron checkpoint that carries none.
    """
    try:
        found = sniff(path)
    except StorageError:
        if path.is_dir() and (unfinished := sorted(p.name for p in path.glob("iter_*") if p.is_dir())):
            fault = f"unfinished: no tracker names an iteration, {', '.join(unfinished[-3:])} lie there"
            return Summary(path, "megatron", fault=fault)
        raise
    faults = []
    if path.name.endswith(".partial"):
        faults.append("unfinished: this is the working folder of a run that did not end")
    try:
        opened = with_config(found.open(), hf_config)
    except MbxError as error:
        faults.append(error.fact)
        opened = _salvaged(found)
    architecture, table = None, None
    try:
        architecture = opened.architecture
        table = _table(opened, architecture)
    except MbxError as error:
        faults.append(error.fact)
    beside = opened.hf if opened.hf is not None and opened.hf.is_dir() else None
    listed = _listed(opened.tensors)
    return Summary(
        path,
        found.format.title,
        writer=opened.writer,
        core=opened.core,
        model_class=opened.model_class,
        fault=faults[0] if faults else None,
        iteration=_iteration(opened),
        architecture=architecture,
        table=None if table is None else table.name,
        flavour=(table.flavour or TEXT_ALONE) if table and table.flavours and opened.spelling == "mcore" else None,
        towers=_towers(opened, table),
        kept=_kept(opened, table),
        layout=_layout(opened, listed),
        tensors=listed,
        other_state=opened.other_state,
        num_objects=opened.num_objects,
        files=_files(found, opened),
        side_files=tuple(hf.side_files(beside)) if beside is not None else (),
        adapter=_adapter(opened),
    )


def _salvaged(found: Sniffed) -> Checkpoint:
    """A checkpoint that cannot be opened, with what its headers still say."""
    home, spelling, tensors = found.home, found.format.spelling, dict[str, StoredTensor]()
    try:
        if (home / METADATA_NAME).is_file():
            tensors = {name: tensor for name, tensor in read_dcp(home).tensors.items() if is_weight(name)}
        elif any(home.glob("*.safetensors")):
            tensors = read_folder(home).tensors
    except StorageError:  # the fault that is reported already
        pass
    beside = home / "hf" if spelling == "mcore" else home
    return Checkpoint(found.path, found.format.name, spelling, home, tensors, hf=beside)


def _table(opened: Checkpoint, architecture: str | None) -> Table | None:
    """The table that covers a checkpoint, by its config.json or else by Megatron's sidecars; None where none does.

    Of a Megatron one with towers it is in the flavour that the keys tell.
    """
    if architecture is None:
        return None
    try:
        if (config := hf.config_file(opened)) is not None:
            return arranged(table_for(config), opened.tensors)
        return architecture_of(opened).table
    except UnsupportedError:
        return None


def _towers(opened: Checkpoint, table: Table | None) -> dict[str, tuple[int, int]]:
    """Tensors around the text model of a Megatron checkpoint that holds towers; none for any other."""
    if table is None or not table.flavour or opened.spelling != "mcore":
        return {}
    text = table.prefix
    return _by_module(tensor for name, tensor in opened.tensors.items() if text and not name.startswith(text))


def _kept(opened: Checkpoint, table: Table | None) -> dict[str, tuple[int, int]]:
    """Tensors of the source that no Megatron module holds, and that an export gives back."""
    if opened.hf is None or opened.spelling != "mcore":
        return {}
    try:
        kept = hf.kept_tensors(opened.home, opened.hf)
        config = hf.config_file(opened)
        fields = table.config.to_mcore(config) if kept and table and config else {}
        ahead = lie_beside(table, fields, kept, opened.tensors) if table and fields else frozenset()
    except MbxError:  # a damaged one is reported by what reads it
        return {}
    found = _by_module(tensor for name, tensor in kept.items() if name not in ahead)
    return found | count_by((AHEAD, kept[name].nbytes) for name in kept if name in ahead)


def _by_module(tensors: Iterable[StoredTensor]) -> dict[str, tuple[int, int]]:
    """(tensors, bytes) by the module of the model that each name begins with."""
    return count_by((_CONTAINERS.sub("", tensor.name).partition(".")[0], tensor.nbytes) for tensor in tensors)


def _adapter(opened: Checkpoint) -> AdapterFacts | None:
    try:
        return describe(opened)
    except StorageError:  # nothing says its alpha; the tensors are listed all the same
        return None


def _iteration(opened: Checkpoint) -> int | None:
    if opened.spelling != "mcore":
        return None
    number = (opened.common or {}).get("iteration")
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    match = re.fullmatch(r"iter_(\d+)", opened.home.name)
    return int(match[1]) if match else None


def _layout(opened: Checkpoint, tensors: tuple[Tensor, ...]) -> dict[str, int]:
    """The sizes that a checkpoint states; else the tensor-parallel one it was cut for, which the embedding shows."""
    if (layout := opened.layout) is not None:
        return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep, "etp": layout.expert_tp}
    grid = next((t.grid for t in tensors if t.name.endswith("word_embeddings.weight")), None)
    return {} if grid is None or opened.spelling != "mcore" else {"tp": grid[-2]}


def _files(found: Sniffed, opened: Checkpoint) -> dict[str, int]:
    """Data files by name with their sizes: those that tensors lie in, else what looks like one."""
    home = found.home
    names = {str(path.relative_to(home)) for path in opened.files()}
    names |= {str(path.relative_to(home)) for pattern in ("*.distcp", "mp_rank_*/*.pt") for path in home.glob(pattern)}
    names |= set(opened.weight_files)
    return {name: (home / name).stat().st_size for name in sorted(names) if (home / name).is_file()}


def _listed(tensors: Mapping[str, StoredTensor]) -> tuple[Tensor, ...]:
    """Headers as they are shown."""
    return tuple(
        Tensor(
            t.name,
            t.dtype,
            t.shape,
            t.nbytes,
            tuple(len({chunk.offsets[dim] for chunk in t.chunks}) for dim in range(len(t.shape))),
            tuple(sorted({chunk.file for chunk in t.chunks})),
        )
        for t in tensors.values()
    )
