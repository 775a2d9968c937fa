"""A Megatron Core torch_dist checkpoint as a folder: finding, reading and laying one out.

ckpt/latest_checkpointed_iteration.txt
ckpt/iter_0000000/{__R_N.distcp, .metadata, metadata.json, common.pt, hf/}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.engine.plan import Draft
from converters.errors import StorageError
from converters.mcore.fsdp_dtensor import Stored, is_apart, parse_apart
from converters.mcore.hybrid_form import from_hybrid, gpt_args, has_gpt_form
from converters.mcore.keys import canonical_names
from converters.mcore.megatron_args import config_of_args, is_silent
from converters.mcore.optimizer_state import is_state, weight_of
from converters.mcore.releases import CURRENT, written_by
from converters.rows.expr import Value
from converters.tensors import Chunk, Shape, StoredTensor, nbytes_of
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.files import frame_bytes
from mbx.formats.gathering import gather
from mbx.formats.placement import Framing, Order, Placement
from mbx.formats.sidecars import common_of, common_place, hf_folder, read_run_config
from mbx.torchfile.archive import extra_state_archive, object_archive
from mbx.torchfile.dcp import build_dcp_metadata, read_dcp
from mbx.untrusted.small_files import POINTER, read_json, read_small

TRACKER = "latest_checkpointed_iteration.txt"
#: Chunks are cut by rows above this, so that no archive needs 64-bit zip fields.
_LARGEST_CHUNK = 1 << 30
_LARGEST_FILE = 1 << 30


#: How the projections begin by which a student compared its hidden states with its teacher's (`mbx train`).
_PROJECTIONS = "distill."
#: Names of a checkpoint that are an optimizer's, and of all that is no weight.
_OPTIMIZER = ("optimizer.", "chained_")
_STATE = (*_OPTIMIZER, "rng_state", "rerun_state", "opt_param_scheduler", "common_state", _PROJECTIONS)
#: What NeMo 2 puts before every name: its module around the model.
_WRAPPER = "module."
#: Files of an iteration's folder, one of which every Megatron format has; or one of these folders and files.
_OF_ITERATION = (".metadata", "metadata.json", "common.pt")
_WITHIN_ITERATION = ("mp_rank_*", "__*.distcp")


class TorchDist:
    """The format of Megatron Core's distributed checkpoints."""

    name = title = "torch_dist"
    spelling: Spelling = "mcore"

    def find(self, path: Path) -> Path | None:
        """The iteration's folder meant by `path`, the root or that folder itself."""
        return find_iteration(path)

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open an iteration; nothing but headers is read."""
        return open_torch_dist(path, home)

    def place(self, order: Order) -> Placement:
        """Lay out `__R_N.distcp` files."""
        return place(order.plan.drafts, order.plan.objects)


def find_iteration(path: Path) -> Path | None:
    """The `iter_*` folder meant by `path`: itself, or the one that the tracker names; None where there is neither.

    Folders that the tracker does not name are ignored: they may be unfinished. StorageError for a tracker that names
    none.
    """
    if any((path / name).is_file() for name in _OF_ITERATION):
        return path
    if any(any(path.glob(pattern)) for pattern in _WITHIN_ITERATION):
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    text = read_small(tracker, POINTER).decode("utf-8", "replace").strip()
    name = "release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else None
    if name is None:
        raise StorageError(f"`{tracker}` says {text[:40]!r}; an iteration number was expected")
    if not (path / name).is_dir():
        raise StorageError(f"`{tracker}` names iteration {text}, but `{path / name}` does not exist")
    return path / name


def root_of(path: Path, iteration: Path) -> Path:
    """The folder with the tracker, as far as there is one."""
    return iteration.parent if iteration != path or (iteration.parent / TRACKER).is_file() else iteration


def is_weight(name: str) -> bool:
    """Whether a name of a torch_dist checkpoint is the model's, not a training run's state."""
    return not name.startswith(_STATE)


def _unwrapped(weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Weights by their names in the model, where all of them carry the wrapper's around it (NeMo 2)."""
    if not weights or not all(name.startswith(_WRAPPER) for name in weights):
        return dict(weights)
    return {bare: replace(t, name=bare) for name, t in weights.items() for bare in (name.removeprefix(_WRAPPER),)}


def open_torch_dist(path: Path, iteration: Path) -> Checkpoint:
    """Open the iteration of the checkpoint at `path`; StorageError where it is not whole."""
    metadata = iteration / "metadata.json"
    if not metadata.is_file():
        raise StorageError(f"`{iteration}` has no `metadata.json`: the checkpoint was not finished")
    try:
        backend = read_json(metadata).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise StorageError(f"`{metadata}` is not valid JSON: {error}") from error
    if backend != "torch_dist":
        raise StorageError(f"`{metadata}` says sharded_backend = {backend!r}; this reader takes torch_dist")
    dcp = read_dcp(iteration)
    weights = _unwrapped({name: tensor for name, tensor in dcp.tensors.items() if is_weight(name)})
    rest = [tensor for name, tensor in dcp.tensors.items() if not is_weight(name)]
    common = common_of(iteration, dcp.objects)
    args = common.pop("args", None)
    states = (name.removeprefix(_WRAPPER) for name in dcp.objects if is_weight(name))
    objects = [name for name in states if "_extra_state/shard_" in name]
    tensors, model_class = canonical_tensors(weights), CURRENT.kind_of(weights)
    state = {tensor.name: tensor for tensor in rest if tensor.name.startswith(_OPTIMIZER)}
    if has_gpt_form(tensors):
        args = gpt_args(args) if isinstance(args, dict) else None
        tensors, state = as_gpt(tensors, state, config_of_args(args) if args else {})
        objects = []
    elif any(map(is_apart, weights)):  # saved with singleton_local_shards; `_extra_state`s are apart as well
        tensors = canonical_tensors(
            gather(weights, parse_apart, config_of_args(args) if isinstance(args, dict) else {})
        )
        objects = []
    left_out = []
    if state:
        size = sum(tensor.nbytes for tensor in state.values())
        left_out.append(f"optimizer state: {len(state)} tensors, {size} bytes")
    if projections := [tensor for tensor in rest if tensor.name.startswith(_PROJECTIONS)]:
        left_out.append(f"projections to a teacher's width: {len(projections)} tensors")
    if any(name.startswith(("rng_state", "rerun_state")) for name in dcp.objects):
        left_out.append("random-number state")
    run_config = read_run_config(iteration)
    return Checkpoint(
        path,
        "torch_dist",
        "mcore",
        iteration,
        tensors,
        writer=_writer(run_config, args),
        core=written_by(common_place(iteration, dcp.objects)),
        model_class=model_class,
        root=root_of(path, iteration),
        hf=hf_folder(iteration),
        objects=tuple(objects),
        num_objects=len(dcp.objects),
        args=args if isinstance(args, dict) else None,
        common=common,
        run_config=run_config,
        left_out=tuple(left_out),
        other_state=count_by(("optimizer" if t.name in state else "other", t.nbytes) for t in rest),
        state=state,
    )


def _writer(run_config: object, args: object) -> str:
    """The tool by what it leaves beside the tensors; only they are torch's."""
    if run_config:
        return "Megatron-Bridge"
    if isinstance(args, dict):
        return "mcore-bridge" if is_silent(args) else "Megatron-LM"
    return "torch"


def canonical_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the names that Transformer Engine's layers give them; StorageError when two meet in one name."""
    names = canonical_names(tensors)
    if len(set(names.values())) < len(names):
        (twice, _), *_ = Counter(names.values()).most_common(1)
        raise StorageError(f"`{twice}` is stored under two names")
    return {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}


def as_gpt(
    tensors: Mapping[str, StoredTensor], state: Mapping[str, StoredTensor], config: Mapping[str, Value]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Weights of a HybridModel, and an optimizer's states of them by stored name, as the GPTModel of `config` has.

    States that are not in the space of the weights keep their names.
    """

    def parse(name: str) -> Stored:
        return Stored(from_hybrid(name), None, None)

    groups: dict[str, dict[str, StoredTensor]] = {}
    out = {}
    for name, tensor in state.items():
        if is_state(name):
            groups.setdefault(name.removesuffix(weight_of(name)), {})[weight_of(name)] = tensor
        else:
            out[name] = tensor
    for prefix, part in groups.items():
        names = canonical_names(part)
        found = gather({names[key]: tensor for key, tensor in part.items()}, parse, config)
        out |= {prefix + key: replace(tensor, name=prefix + key) for key, tensor in found.items()}
    return gather(tensors, parse, config), out


def count_by(items: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """(count, bytes) by name, of pairs of name and bytes."""
    counts: dict[str, tuple[int, int]] = {}
    for name, nbytes in items:
        count, total = counts.get(name, (0, 0))
        counts[name] = (count + 1, total + nbytes)
    return dict(sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class ArchivePlacement(Placement):
    """Target tensors whose chunks are archives, objects with their (file, byte, length), and payloads of some.

    An object without a payload is an empty `_extra_state`.
    """

    objects: Mapping[str, tuple[str, int, int]]
    payloads: Mapping[str, bytes]

    def before(self) -> Iterable[Framing]:
        """File, byte offset and content of every object."""
        empty = extra_state_archive()
        for name, (file, start, _) in self.objects.items():
            yield file, start, self.payloads.get(name, empty)

    def archive_dtypes(self) -> dict[tuple[str, int], str]:
        """Dtype of the chunk that starts at (file, byte)."""
        return {(c.file, c.start): t.dtype for t in self.tensors.values() for c in t.chunks}

    @property
    def late_names(self) -> tuple[str, ...]:
        """What names the tensors, the common state, and last the file whose absence marks an unfinished checkpoint."""
        return (".metadata", "common.pt", "metadata.json")

    def late(self, common: Mapping[str, object]) -> dict[str, bytes]:
        """The three of `late_names`."""
        index = build_dcp_metadata(self.tensors.values(), self.objects)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        contents = (index, object_archive(dict(common)), json.dumps(backends).encode())
        return dict(zip(self.late_names, contents, strict=True))


def place(
    drafts: Iterable[Draft], objects: Iterable[str] | Mapping[str, bytes], unstacked: Mapping[str, int] | None = None
) -> ArchivePlacement:
    """Lay out archives in `__{rank}_{n}.distcp` files, in draft order; objects follow in rank 0's.

    Objects without a payload of their own are empty `_extra_state`s. `unstacked` counts, by tensor, the leading
    dimensions that its archives leave out.
    """
    payloads = dict(objects) if isinstance(objects, Mapping) else {}
    open_file: dict[int, tuple[int, int]] = {}
    sizes: dict[str, int] = {}

    def reserve(rank: int, nbytes: int) -> tuple[str, int]:
        number, at = open_file.get(rank, (0, 0))
        if at and at + nbytes > _LARGEST_FILE:
            number, at = number + 1, 0
        open_file[rank] = (number, at + nbytes)
        name = f"__{rank}_{number}.distcp"
        sizes[name] = at + nbytes
        return name, at

    tensors = {}
    for draft in drafts:
        chunks, without = [], (unstacked or {}).get(draft.name, 0)
        for rank, offsets, extent in draft.boxes:
            for start, part in _split(draft.dtype, offsets, extent):
                nbytes = frame_bytes(draft.dtype, part[without:])
                file, at = reserve(rank, nbytes)
                chunks.append(Chunk(start, part, file, at, nbytes, without))
        tensors[draft.name] = StoredTensor(draft.name, draft.dtype, draft.shape, tuple(chunks))
    empty = len(extra_state_archive())
    lengths = {name: len(payloads[name]) if name in payloads else empty for name in objects}
    places = {name: (*reserve(0, length), length) for name, length in lengths.items()}
    return ArchivePlacement(tensors, sizes, places, payloads)


def _split(dtype: str, offsets: Shape, sizes: Shape) -> Iterable[tuple[Shape, Shape]]:
    """Cut an oversized box along its first dimension longer than one."""
    nbytes = nbytes_of(dtype, sizes)
    axis = next((i for i, size in enumerate(sizes) if size > 1), None)
    if nbytes <= _LARGEST_CHUNK or axis is None:
        yield offsets, sizes
        return
    step = max(1, sizes[axis] * _LARGEST_CHUNK // nbytes)
    for at in range(0, sizes[axis], step):
        count = min(step, sizes[axis] - at)
        yield (
            (*offsets[:axis], offsets[axis] + at, *offsets[axis + 1 :]),
            (*sizes[:axis], count, *sizes[axis + 1 :]),
        )
