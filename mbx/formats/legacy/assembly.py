"""Whole tensors from the shards that ranks hold, by arithmetic on byte offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from converters.errors import StorageError
from converters.mcore.cuts import Cut
from converters.mcore.keys import parse_key
from converters.tensors import DTYPE_BITS, Chunk, Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a tensor: `shape` elements of `dtype`, row-major, at byte `start` of `file`.

    It begins `inside` bytes behind the start of the archive's storage of that name.
    """

    file: str
    start: int
    dtype: str
    shape: Shape
    storage: str = ""
    inside: int = 0


@dataclass(slots=True)
class _Whole:
    """A tensor that grows entry by entry: shape and dtype of one entry, chunks, and the entries seen."""

    shape: Shape
    dtype: str
    stack: list[int]
    chunks: list[Chunk] = field(default_factory=list)
    seen: set[Shape] = field(default_factory=set)


class Assembly:
    """Collects shards under keys of single layers; `stacked` decoders get one tensor per parameter instead."""

    def __init__(self, stacked: bool, num_layers: int) -> None:
        self.stacked, self.num_layers = stacked, num_layers
        self._wholes: dict[str, _Whole] = {}

    def add(
        self, key: str, expert: int | None, shards: Sequence[Shard], cut: Cut, atoms: tuple[tuple[str, int], ...]
    ) -> None:
        """Add the parameter `key` (of one layer), cut over `shards`; `atoms` are parts that get keys of their own."""
        parsed = parse_key(key)
        index: Shape = ()
        if self.stacked and parsed.site == "decoder" and parsed.layer is not None:
            key, index = f"decoder.layers.{parsed.param}", (parsed.layer,)
        if expert is not None:
            index = (*index, expert)
        local = shards[0].shape
        if cut.dim is None or len(shards) == 1:
            shards = shards[:1]
        if atoms:
            self._add_atoms(key, index, shards, atoms)
            return
        halves = 2 if cut.gated and len(shards) > 1 else 1
        dim = cut.dim or 0
        shape = (*local[:dim], local[dim] * len(shards), *local[dim + 1 :]) if local else ()
        whole = self._whole(key, index, shape, shards[0].dtype)
        part = local[dim] // halves if local else 0
        for rank, shard in enumerate(shards):
            for half in range(halves):
                offsets, sizes = [0] * len(local), list(local)
                if local:
                    offsets[dim] = (half * len(shards) + rank) * part
                    sizes[dim] = part
                inside = half * part * math.prod(local[1:]) if halves > 1 else 0
                self._chunk(whole, index, tuple(offsets), tuple(sizes), shard, inside)

    def _add_atoms(self, key: str, index: Shape, shards: Sequence[Shard], atoms: tuple[tuple[str, int], ...]) -> None:
        """A packed parameter: each rank holds its part of every atom, one behind another."""
        inner = shards[0].shape[1:]
        if sum(rows for _, rows in atoms) != shards[0].shape[0] * len(shards):
            raise StorageError(
                f"`{key}` has {shards[0].shape[0]} rows on each of {len(shards)} ranks; "
                f"its config asks for {sum(rows for _, rows in atoms)} in all"
            )
        above = 0
        for name, rows in atoms:
            part = rows // len(shards)
            whole = self._whole(f"{key}.{name}", index, (rows, *inner), shards[0].dtype)
            for rank, shard in enumerate(shards):
                offsets = (rank * part, *(0 for _ in inner))
                self._chunk(whole, index, offsets, (part, *inner), shard, above * math.prod(inner))
            above += part

    def _whole(self, key: str, index: Shape, shape: Shape, dtype: str) -> _Whole:
        whole = self._wholes.setdefault(key, _Whole(shape, dtype, [0] * len(index)))
        if (whole.shape, whole.dtype) != (shape, dtype):
            raise StorageError(
                f"`{key}` is {list(shape)} {dtype} in one layer and {list(whole.shape)} {whole.dtype} in another"
            )
        whole.stack = [max(a, b + 1) for a, b in zip(whole.stack, index, strict=True)]
        whole.seen.add(index)
        return whole

    @staticmethod
    def _chunk(whole: _Whole, index: Shape, offsets: Shape, sizes: Shape, shard: Shard, inside: int) -> None:
        start = shard.start + inside * DTYPE_BITS[shard.dtype] // 8
        whole.chunks.append(Chunk((*index, *offsets), (*(1 for _ in index), *sizes), shard.file, start))

    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors; StorageError when a layer or an expert of a stack is missing."""
        out = {}
        for key, whole in self._wholes.items():
            stack = list(whole.stack)
            if parse_key(key).stacked:
                stack[0] = self.num_layers
            if len(whole.seen) != math.prod(stack):
                raise StorageError(f"`{key}` has {len(whole.seen)} of {math.prod(stack)} layers and experts {stack}")
            out[key] = StoredTensor(key, whole.dtype, (*stack, *whole.shape), tuple(whole.chunks))
        return out
