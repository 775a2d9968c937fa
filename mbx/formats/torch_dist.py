"""A Megatron Core torch_dist checkpoint as a folder: finding, reading and laying one out.

ckpt/latest_checkpointed_iteration.txt
ckpt/iter_0000000/{__R_N.distcp, .metadata, metadata.json, common.pt, hf/}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.engine.plan import Draft
from converters.errors import StorageError
from converters.tensors import Chunk, Shape, StoredTensor, nbytes_of
from mbx.formats import kinds
from mbx.formats.files import frame_bytes
from mbx.torchfile.archive import extra_state_archive, object_archive
from mbx.torchfile.dcp import DcpCheckpoint, build_dcp_metadata, read_dcp

TRACKER = kinds.TRACKER
ITERATION = "iter_0000000"
#: Chunks are cut by rows above this, so that no archive needs 64-bit zip fields.
_LARGEST_CHUNK = 1 << 30
_LARGEST_FILE = 1 << 30


@dataclass(frozen=True, slots=True)
class McoreFolder:
    """An opened checkpoint: `root` holds the tracker, `iteration` the tensors; `hf` the side files, if any."""

    root: Path
    iteration: Path
    hf: Path | None
    dcp: DcpCheckpoint


def find_iteration(path: Path) -> Path:
    """The `iter_*` folder meant by `path`: itself, or the one the tracker names.

    Folders the tracker does not name are ignored: they may be unfinished. StorageError when there is none.
    """
    if (path / "metadata.json").is_file() or (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        found = sorted(p.name for p in path.glob("iter_*") if p.is_dir())
        raise StorageError(
            f"`{path}` is no Megatron Core checkpoint: it has neither `metadata.json` nor `{TRACKER}`",
            hint=f"name an iteration: {path / found[-1]}"
            if found
            else kinds.found_instead(path) or "it is no Hugging Face folder either: that has `config.json`",
        )
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    name = "release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else None
    if name is None:
        raise StorageError(f"`{tracker}` says {text[:40]!r}; an iteration number was expected")
    if not (path / name).is_dir():
        raise StorageError(f"`{tracker}` names iteration {text}, but `{path / name}` does not exist")
    return path / name


def open_torch_dist(path: Path) -> McoreFolder:
    """Open the checkpoint at `path`, the root or an `iter_*` folder; nothing but headers is read."""
    iteration = find_iteration(path)
    metadata = iteration / "metadata.json"
    if not metadata.is_file():
        raise StorageError(f"`{iteration}` has no `metadata.json`: the checkpoint was not finished")
    try:
        backend = json.loads(metadata.read_text(encoding="utf-8")).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise StorageError(f"`{metadata}` is not valid JSON: {error}") from error
    if backend != "torch_dist":
        raise StorageError(f"`{metadata}` says sharded_backend = {backend!r}; this reader takes torch_dist")
    hf = iteration / "hf"
    root = iteration.parent if iteration != path or (iteration.parent / TRACKER).is_file() else iteration
    return McoreFolder(root, iteration, hf if hf.is_dir() else None, read_dcp(iteration))


@dataclass(frozen=True, slots=True)
class Placement:
    """Target tensors with a place for every chunk, objects likewise, and the size of every file.

    `payloads` are the archives of objects; one that has none there is an empty `_extra_state`.
    """

    tensors: dict[str, StoredTensor]
    objects: dict[str, tuple[str, int, int]]
    file_sizes: dict[str, int]
    payloads: Mapping[str, bytes]

    def index_names(self) -> tuple[str, ...]:
        """Files that `write_index` makes."""
        return (".metadata", "common.pt", "metadata.json")

    def write_index(self, iteration: Path, common: Mapping[str, object]) -> None:
        """Write what names the tensors, and the common state."""
        write_index(iteration, self, common)

    def object_archives(self) -> Iterator[tuple[str, int, bytes]]:
        """File, byte offset and content of every object."""
        empty = extra_state_archive()
        for name, (file, start, _) in self.objects.items():
            yield file, start, self.payloads.get(name, empty)

    def archive_dtypes(self) -> dict[tuple[str, int], str]:
        """Dtype of the chunk that starts at (file, byte)."""
        return {(c.file, c.start): t.dtype for t in self.tensors.values() for c in t.chunks}


def place(
    drafts: Iterable[Draft], objects: Iterable[str] | Mapping[str, bytes], unstacked: Mapping[str, int] | None = None
) -> Placement:
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
    return Placement(tensors, places, sizes, payloads)


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


def write_index(iteration: Path, placed: Placement, common: Mapping[str, object]) -> None:
    """Write `.metadata`, `common.pt`, and last `metadata.json`, whose absence marks an unfinished checkpoint."""
    (iteration / ".metadata").write_bytes(build_dcp_metadata(placed.tensors.values(), placed.objects))
    (iteration / "common.pt").write_bytes(object_archive(dict(common)))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")


def common_state(iteration: int = 0) -> dict[str, object]:
    """Content of `common.pt` that megatron-core 0.16 asks for."""
    return {
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
