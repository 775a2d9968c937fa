"""What a folder is: its format, who wrote it, whether it is whole, and the tensors it holds; from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import StorageError, UnsupportedError
from converters.expr import Value
from converters.tensors import StoredTensor
from mbx.convert import model_tensors
from mbx.io import hf, torch_dist
from mbx.io.archive import load_archive
from mbx.io.safetensors import read_folder
from mbx.io.torch_values import Namespace
from mbx.registry import table_for

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_OPTIMIZER = ("optimizer.", "chained_")


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
class Checkpoint:
    """What `examine` found. `fault` says what is missing or damaged; None means whole.

    `tensors` are the model's weights; `other_state` counts the rest by kind, as (tensors, bytes). `files` holds the
    data files with their sizes, `layout` the parallel sizes as far as they show.
    """

    path: Path
    format: str
    writer: str | None = None
    fault: str | None = None
    iteration: int | None = None
    architecture: str | None = None
    table: str | None = None
    layout: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    other_state: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    num_objects: int = 0
    files: Mapping[str, int] = field(default_factory=dict)
    side_files: tuple[str, ...] = ()

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
        return _count((tensor.dtype, tensor.nbytes) for tensor in self.tensors)


def examine(path: Path) -> Checkpoint:
    """Find out what `path` is; StorageError for a path that is no checkpoint at all."""
    if not path.is_dir():
        what = "is a file; a folder was expected" if path.exists() else "does not exist"
        raise StorageError(f"`{path}` {what}", hint="name a checkpoint folder")
    iteration = _iteration(path)
    if iteration is not None:
        legacy = sorted(p for p in iteration.glob("mp_rank_*") if _RANK.fullmatch(p.name))
        return _legacy(path, iteration, legacy) if legacy else _torch_dist(path, iteration)
    if (path / hf.CONFIG).is_file() or any(path.glob("*.safetensors")):
        return _hugging_face(path)
    if unfinished := sorted(p.name for p in path.glob("iter_*") if p.is_dir()):
        fault = f"unfinished: no `{torch_dist.TRACKER}` names an iteration, {', '.join(unfinished[-3:])} lie there"
        return Checkpoint(path, "megatron", fault=fault)
    raise StorageError(
        f"`{path}` is no checkpoint that mbx knows",
        hint=f"a Hugging Face folder has `{hf.CONFIG}`, a Megatron checkpoint `{torch_dist.TRACKER}` or `.metadata`",
    )


def _iteration(path: Path) -> Path | None:
    """The iteration folder meant by `path`; None where it is no Megatron checkpoint."""
    inside = (".metadata", "metadata.json", "common.pt")
    if any((path / name).is_file() for name in inside) or any(path.glob("mp_rank_*")) or any(path.glob("__*.distcp")):
        return path
    return torch_dist.find_iteration(path) if (path / torch_dist.TRACKER).is_file() else None


def _hugging_face(path: Path) -> Checkpoint:
    fault, config, files = None, dict[str, Value](), tuple[str, ...]()
    tensors: Mapping[str, StoredTensor] = {}
    try:
        config = hf.read_config(path)
        weights = read_folder(path)
        tensors, files = weights.tensors, weights.files
    except StorageError as error:
        fault = error.fact
    fault = fault or _partial(path)
    architecture, table = _model(config)
    return Checkpoint(
        path,
        "huggingface",
        writer="mbx" if (path / hf.MANIFEST).is_file() else None,
        fault=fault,
        architecture=architecture,
        table=table,
        tensors=_described(tensors),
        files=_sizes(path, files),
        side_files=tuple(hf.side_files(path)),
    )


def _torch_dist(path: Path, iteration: Path) -> Checkpoint:
    fault = _partial(path)
    tensors: Mapping[str, StoredTensor] = {}
    num_objects, files = 0, tuple(p.name for p in sorted(iteration.glob("*.distcp")))
    try:
        dcp = torch_dist.open_torch_dist(iteration).dcp
        tensors, num_objects, files = dcp.tensors, len(dcp.objects), dcp.files
    except StorageError as error:
        fault = fault or error.fact
    model = model_tensors(tensors)
    rest = [tensor for name, tensor in tensors.items() if name not in model]
    config = hf.read_config(iteration / "hf") if (iteration / "hf" / hf.CONFIG).is_file() else {}
    architecture, table = _model(config)
    common, writer = _common(iteration)
    number = common.get("iteration")
    if isinstance(number, bool) or not isinstance(number, int):
        number = int(iteration.name[5:]) if re.fullmatch(r"iter_\d+", iteration.name) else None
    root = path if path != iteration else iteration.parent
    if (root / hf.MANIFEST).is_file():
        writer = "mbx"
    described = _described(model)
    return Checkpoint(
        path,
        "torch_dist",
        writer=writer,
        fault=fault,
        iteration=number,
        architecture=architecture,
        table=table,
        layout=_layout_of(described),
        tensors=described,
        other_state=_count(("optimizer" if t.name.startswith(_OPTIMIZER) else "other", t.nbytes) for t in rest),
        num_objects=num_objects,
        files=_sizes(iteration, files),
        side_files=tuple(hf.side_files(iteration / "hf")) if (iteration / "hf").is_dir() else (),
    )


def _legacy(path: Path, iteration: Path, ranks: list[Path]) -> Checkpoint:
    """A Megatron-LM `torch` checkpoint: one file a rank, its layout in the folders' names."""
    matches = [match for rank in ranks if (match := _RANK.fullmatch(rank.name))]
    named = {axis: [int(m[group]) for m in matches if m[group]] for group, axis in enumerate(("tp", "pp", "ep"), 1)}
    layout = {axis: 1 + max(ranks) for axis, ranks in named.items() if ranks}
    num_ranks = math.prod(layout.values())
    files = {f"{p.parent.name}/{p.name}": p.stat().st_size for rank in ranks for p in sorted(rank.glob("*.pt"))}
    fault = _partial(path)
    if lacking := num_ranks - len(ranks):
        fault = fault or f"{lacking} of {num_ranks} ranks are missing"
    if empty := [rank.name for rank in ranks if not any(rank.glob("*.pt"))]:
        fault = fault or f"`{empty[0]}` holds no .pt file"
    number = int(iteration.name[5:]) if re.fullmatch(r"iter_\d+", iteration.name) else None
    writer = "mbx" if any((folder / hf.MANIFEST).is_file() for folder in (path, iteration.parent)) else "Megatron-LM"
    return Checkpoint(
        path, "megatron legacy", writer=writer, fault=fault, iteration=number, layout=layout, files=files
    )


def _common(iteration: Path) -> tuple[dict[object, object], str | None]:
    """`common.pt`, and who wrote the checkpoint as far as the folder shows."""
    common: object = {}
    if (iteration / "common.pt").is_file():
        common, _ = load_archive(iteration / "common.pt", unknown="opaque")
    common = common if isinstance(common, dict) else {}
    if (iteration / "run_config.yaml").is_file():
        return common, "Megatron-Bridge"
    return common, "Megatron-LM" if isinstance(common.get("args"), Namespace) else "torch"


def _partial(path: Path) -> str | None:
    if path.name.endswith(".partial"):
        return "unfinished: this is the working folder of a run that did not end"
    return None


def _model(config: Mapping[str, Value]) -> tuple[str | None, str | None]:
    """Architecture that a config names, and the table that covers it."""
    names = config.get("architectures")
    architecture = ", ".join(map(str, names)) if isinstance(names, list) and names else config.get("model_type")
    if architecture is None:
        return None, None
    try:
        return str(architecture), table_for(config).name
    except UnsupportedError:
        return str(architecture), None


def _layout_of(tensors: Iterable[Tensor]) -> dict[str, int]:
    """The tensor-parallel size the chunks were cut for, which the embedding shows."""
    for tensor in tensors:
        if tensor.name.endswith("word_embeddings.weight"):
            return {"tp": tensor.grid[-2]}
    return {}


def _described(tensors: Mapping[str, StoredTensor]) -> tuple[Tensor, ...]:
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


def _count(items: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for name, nbytes in items:
        count, total = counts.get(name, (0, 0))
        counts[name] = (count + 1, total + nbytes)
    return dict(sorted(counts.items()))


def _sizes(folder: Path, files: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in files}
