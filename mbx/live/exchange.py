"""What all ranks hold together: one exchange of objects, after which every rank knows every box and who has it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch

from converters.errors import CoverageError, MbxError, UsageError
from converters.mcore.hybrid_form import from_hybrid, has_gpt_form
from converters.mcore.keys import canonical_names
from converters.tensors import Chunk, Shape, StoredTensor
from mbx.formats.files import os_failure
from mbx.live.shards import Shard

#: A box of the model: the key of its tensor, and its number among that one's chunks.
ChunkId = tuple[str, int]


@dataclass(frozen=True, slots=True)
class World:
    """Ranks, and what each holds of the global tensors `sources`, whose chunks are the boxes that ranks own.

    `holders` are the ranks that have a box, its owner first; `mine` are this rank's shards by box, several where a
    chunk keeps a copy of what another has. `stages` are the pipeline stages by rank; `adapted` says that some rank has
    adapters.
    """

    rank: int
    size: int
    stages: tuple[int, ...]
    sources: Mapping[str, StoredTensor]
    holders: Mapping[ChunkId, tuple[int, ...]]
    mine: Mapping[ChunkId, tuple[Shard, ...]]
    adapted: bool = False

    def owned(self, chunk: ChunkId) -> bool:
        """Whether this rank's copy of a box is the one that counts; others are replicas."""
        return self.holders[chunk][0] == self.rank

    @property
    def heads(self) -> tuple[int, ...]:
        """The first rank of each pipeline stage."""
        return tuple(self.stages.index(stage) for stage in range(max(self.stages) + 1))


#: A shard as it travels: key, dtype, shape, offsets, sizes, whether it is the main copy.
_Told = tuple[str, str, Shape, Shape, Shape, bool]


def exchange(shards: Sequence[Shard] | MbxError, said: object, *, adapted: bool = False) -> World:
    """Tell all ranks what this one holds, or why it cannot; `said` must be the same everywhere. Collective.

    `adapted` says that this rank's part of the model has adapters beside.

    Raises on all ranks what one met; CoverageError where the boxes do not cover a tensor, each element once.
    """
    from mbx.models.megatron.core.groups import parallel_state

    failed = str(shards) if isinstance(shards, MbxError) else ""
    told = [] if isinstance(shards, MbxError) else [_told(shard) for shard in shards]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mark = hashlib.sha256(repr(said).encode()).hexdigest()
    everyone = gather_objects((failed, mark, stage, adapted, told))
    rank = torch.distributed.get_rank()
    if isinstance(shards, MbxError):
        raise shards
    for other, (why, theirs, *_) in enumerate(everyone):
        if why:
            raise UsageError(f"rank {other}: {why}")
        if theirs != mark:
            raise UsageError(f"rank {other} and rank {rank} attached to other folders or configs")
    keys = dict.fromkeys(key for *_, held in everyone for key, *_ in held)
    names = canonical_keys(list(keys))
    sources, holders = _assembled([held for *_, held in everyone], names)
    places = {(key, c.offsets, c.sizes): (key, n) for key, t in sources.items() for n, c in enumerate(t.chunks)}
    mine: dict[ChunkId, tuple[Shard, ...]] = {}
    for shard in shards:
        key = names[shard.key]
        place = places[key, shard.offsets, shard.sizes]
        mine[place] = (*mine.get(place, ()), replace(shard, key=key))
    stages, having = (tuple(told[n] for told in everyone) for n in (2, 3))
    return World(rank, len(everyone), stages, sources, holders, mine, any(having))


@contextmanager
def agreed() -> Iterator[None]:
    """A step that fails on all ranks where it fails on one, there with an error of the same kind. Collective, at its
    end; what ranks do together within it must not be left alone by one of them."""
    failure: MbxError | None = None
    try:
        yield
    except MbxError as error:
        failure = error
    except OSError as error:
        failure = os_failure(error, f"`{os.fsdecode(error.filename)}`" if error.filename else "a file")
        failure.__cause__ = error
    told = gather_objects(None if failure is None else (type(failure), failure.fact, failure.hint))
    if failure is not None:
        raise failure
    if (rank := next((rank for rank, one in enumerate(told) if one), None)) is not None:
        kind, fact, hint = told[rank]
        raise kind(f"rank {rank}: {fact}", hint=hint)


def gather_objects(value: object) -> list:  # type: ignore[type-arg]
    """A value of every rank, by rank. Collective."""
    out: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(out, value)
    return out


def canonical_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key as tables have it, whichever layer spec and model class gave it."""
    formed = {key: from_hybrid(key) for key in keys} if has_gpt_form(keys) else {key: key for key in keys}
    names = canonical_names(list(formed.values()))
    return {key: names[form] for key, form in formed.items()}


def _told(shard: Shard) -> _Told:
    return shard.key, shard.dtype, shard.shape, shard.offsets, shard.sizes, shard.main


def _assembled(
    everyone: Sequence[Sequence[_Told]], names: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], dict[ChunkId, tuple[int, ...]]]:
    """The tensors of the main copies' boxes, and who holds each."""
    owners: dict[str, dict[tuple[Shape, Shape], int]] = {}
    kinds: dict[str, tuple[str, Shape]] = {}
    copies: dict[str, dict[tuple[Shape, Shape], list[int]]] = {}
    for rank, held in enumerate(everyone):
        for key, dtype, shape, offsets, sizes, main in held:
            key = names[key]
            known = kinds.setdefault(key, (dtype, shape))
            if known != (dtype, shape):
                raise CoverageError(
                    f"`{key}` is {dtype} {list(shape)} on rank {rank}, and {known[0]} {list(known[1])} on another"
                )
            copies.setdefault(key, {}).setdefault((offsets, sizes), []).append(rank)
            if not main:
                continue
            boxes = owners.setdefault(key, {})
            if (first := boxes.setdefault((offsets, sizes), rank)) != rank:
                raise CoverageError(f"`{key}` {list(offsets)} is held by ranks {first} and {rank}, each as its own")
    sources: dict[str, StoredTensor] = {}
    holders: dict[ChunkId, tuple[int, ...]] = {}
    for key, (dtype, shape) in kinds.items():
        boxes = owners.get(key, {})
        _check_tiled(key, shape, list(boxes))
        if odd := next((box for box in copies[key] if box not in boxes), None):
            raise CoverageError(f"`{key}` {list(odd[0])}: a copy lies across the boxes of others")
        chunks = []
        for number, ((offsets, sizes), owner) in enumerate(sorted(boxes.items())):
            chunks.append(Chunk(offsets, sizes, f"rank {owner}", 0))
            others = (rank for rank in copies[key][offsets, sizes] if rank != owner)
            holders[key, number] = (owner, *dict.fromkeys(others))
        sources[key] = StoredTensor(key, dtype, shape, tuple(chunks))
    return sources, holders


def _check_tiled(key: str, shape: Shape, boxes: Sequence[tuple[Shape, Shape]]) -> None:
    """CoverageError unless the boxes are of one tensor's elements, each once."""
    held = sum(prod(sizes) for _, sizes in boxes)
    if held != prod(shape):
        raise CoverageError(f"`{key}`: the ranks hold {held} of its {prod(shape)} elements")
    rows: dict[Shape, list[tuple[Shape, Shape]]] = {}
    for offsets, sizes in boxes:
        single = next((n for n, size in enumerate(sizes) if size > 1), len(sizes))
        rows.setdefault(offsets[:single], []).append((offsets, sizes))
    for group in rows.values():
        for n, (at, size) in enumerate(group):
            for other, its in group[:n]:
                if all(a < b + m and b < a + k for a, k, b, m in zip(at, size, other, its, strict=True)):
                    raise CoverageError(f"`{key}`: boxes at {list(other)} and {list(at)} overlap")
