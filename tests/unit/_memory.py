"""A Source and a Sink in memory that count how often each byte is touched, and random unit plans with an oracle."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.regions import Move, Region
from converters.errors import StorageError
from converters.rows.pack import Pack
from converters.tensors import Chunk, StoredTensor, nbytes_of
from converters.torch_casts import TORCH_DTYPES

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class Store:
    """Files in memory; `touched` counts reads or writes of each byte, `crcs` what finish_chunk was told."""

    files: dict[str, Bytes] = field(default_factory=dict)
    touched: dict[str, Bytes] = field(default_factory=dict)
    crcs: dict[tuple[str, int], int] = field(default_factory=dict)
    on_access: Callable[[str], None] = lambda file: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, file: str, content: Bytes) -> None:
        self.files[file] = content
        self.touched[file] = np.zeros(len(content), np.uint8)

    def data_start(self, chunk: Chunk) -> int:
        return chunk.start

    def _touch(self, file: str, start: int, nbytes: int) -> None:
        if start + nbytes > len(self.files[file]):
            raise StorageError(f"`{file}` ends before byte {start + nbytes}")
        with self.lock:
            self.touched[file][start : start + nbytes] += 1
        self.on_access(file)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        self._touch(file, start, len(buffer))
        buffer[:] = self.files[file][start : start + len(buffer)].data

    def write(self, file: str, start: int, data: memoryview) -> None:
        self._touch(file, start, len(data))
        self.files[file][start : start + len(data)] = data

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        with self.lock:
            assert (chunk.file, chunk.start) not in self.crcs or not nbytes_of(dtype, chunk.sizes)
            self.crcs[chunk.file, chunk.start] = crc32


def box(chunk: Chunk) -> tuple[slice, ...]:
    """A chunk's box as an index into the global tensor."""
    return tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))


def raw(tensor: torch.Tensor) -> Bytes:
    """A tensor's bytes, row-major."""
    return cast(Bytes, tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())


def store(
    name: str, dtype: str, value: torch.Tensor, cuts: list[list[int]], into: Store, rng: np.random.Generator
) -> StoredTensor:
    """Store `value` as the chunks that `cuts` (inner edges per dimension) make, in shuffled order and files."""
    tensor = layout(name, dtype, tuple(value.shape), cuts, rng)
    for file, nbytes in sizes([tensor]).items():
        into.add(file, rng.integers(0, 256, nbytes, np.uint8))
    for chunk in tensor.chunks:
        data = raw(value[box(chunk)])
        into.files[chunk.file][chunk.start : chunk.start + len(data)] = data
    return tensor


def layout(
    name: str, dtype: str, shape: tuple[int, ...], cuts: list[list[int]], rng: np.random.Generator
) -> StoredTensor:
    """Places for the chunks of a tensor, with unused bytes between them."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size, inner in zip(shape, cuts, strict=True):
        edges = [0, *sorted(set(inner)), size]
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in zip(edges, edges[1:], strict=False)]
    ends: dict[str, int] = {}
    chunks = []
    for at in rng.permutation(len(boxes)):
        file = f"{name}.{rng.integers(0, 3)}"
        start = ends.get(file, 0) + int(rng.integers(0, 9))
        ends[file] = start + nbytes_of(dtype, boxes[at][1])
        chunks.append(Chunk(*boxes[at], file, start))
    return StoredTensor(name, dtype, shape, tuple(chunks))


def sizes(tensors: list[StoredTensor]) -> dict[str, int]:
    """Bytes of each file that the chunks of `tensors` need."""
    out: dict[str, int] = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            end = chunk.start + nbytes_of(tensor.dtype, chunk.sizes)
            out[chunk.file] = max(out.get(chunk.file, 0), end)
    return out


def content(tensor: StoredTensor, into: Store) -> torch.Tensor:
    """The global tensor that a store holds."""
    out = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
    for chunk in tensor.chunks:
        data = into.files[chunk.file][chunk.start : chunk.start + nbytes_of(tensor.dtype, chunk.sizes)]
        out[box(chunk)] = torch.from_numpy(data.copy()).view(out.dtype).reshape(chunk.sizes)
    return out


def check_crcs(tensor: StoredTensor, crcs: list[int], into: Store) -> None:
    """Every reported CRC-32 is that of the chunk's bytes, and the sink heard the same."""
    for chunk, crc in zip(tensor.chunks, crcs, strict=True):
        data = into.files[chunk.file][chunk.start : chunk.start + nbytes_of(tensor.dtype, chunk.sizes)]
        assert crc == zlib.crc32(data.tobytes()) == into.crcs[chunk.file, chunk.start]


def plan_of(units: list[Unit], sources: list[StoredTensor], targets: list[StoredTensor]) -> Plan:
    """A plan of nothing but moves: what the engine reads of one."""
    none = cast(Any, None)
    return Plan(
        direction="test",
        table=none,
        config={},
        layout=none,
        sources={t.name: t for t in sources},
        drafts=tuple(Draft(t.name, t.dtype, t.shape, ()) for t in targets),
        units=tuple(units),
        ledger=none,
    )


@dataclass(frozen=True)
class Fused:
    """One tensor that fuses atoms: which ones, in how many repeats, behind which stack, padded to how many rows."""

    name: str
    atoms: tuple[int, ...]
    groups: int
    stack: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    transposed: bool = False
    padding: int = 0

    def matrix(self, atoms: list[torch.Tensor]) -> torch.Tensor:
        """The entry's matrix, by slicing and concatenating."""
        out = [atoms[a].chunk(self.groups)[g] for g in range(self.groups) for a in self.atoms]
        rows = torch.cat([*out, torch.zeros((self.padding, *atoms[0].shape[1:]), dtype=atoms[0].dtype)])
        return rows.T if self.transposed else rows

    def regions(self, atoms: list[torch.Tensor], fold: int) -> dict[int, Region]:
        """Where each atom lies, as the planner would say it."""
        pack = Pack(self.groups, tuple(len(atoms[a]) // self.groups for a in self.atoms))
        return {
            atom: Region(self.name, self.index, slot, self.transposed, fold)
            for atom, slot in zip(self.atoms, pack.slots(), strict=True)
        }


def unit_of(
    row: str, atoms: list[torch.Tensor], sources: list[Fused], targets: list[Fused], *, fold: int, shift: int
) -> Unit:
    """The unit that carries `atoms` (given in folded rows) from `sources` to `targets`."""
    origin = {atom: region for fused in sources for atom, region in fused.regions(atoms, fold).items()}
    moves = [Move(origin[atom], region) for fused in targets for atom, region in fused.regions(atoms, fold).items()]
    return Unit(row, tuple(moves), tuple(Entry(f.name, f.index, fold) for f in targets), shift)
