"""Target tensors of a plan that nobody has written: any box of them, made from the sources when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import product

import numpy as np

from converters.engine.pieces import BUFFERS, Piece, moves_into
from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.regions import TensorGrid
from converters.engine.relay import Relay
from converters.engine.stream import Engine
from converters.engine.workers import Buffers, MemoryGate
from converters.errors import CoverageError, UnsupportedError
from converters.protocols import Source
from converters.stored import Bytes, box_of_rows
from converters.tensors import DTYPE_BITS, Chunk, Shape, StoredTensor


class PlannedTensors:
    """The tensors that `plan` would write, read by region. Used by many threads at once.

    The reads of all threads take `max_memory` together, beside the boxes that they return; one that needs more alone
    is a DeviceError. A box of few rows costs the pieces that reach them, one of a transposed tensor its whole entry.
    """

    def __init__(self, plan: Plan, source: Source, max_memory: int) -> None:
        if plan.reencoded:
            raise UnsupportedError(
                f"`{next(iter(plan.reencoded))}` is to be stored by a codec, whose parts are not read by region",
                hint="plan the export without ‹codec› same",
            )
        self.plan, self.source, self.max_memory = plan, source, max_memory
        self.drafts: Mapping[str, Draft] = {draft.name: draft for draft in plan.drafts}
        self._gate = MemoryGate(max_memory)
        self._grids: dict[tuple[str, int], TensorGrid] = {}

    @cached_property
    def _makers(self) -> dict[str, dict[Shape, tuple[Unit, Entry]]]:
        """What makes each entry of each tensor."""
        found: dict[str, dict[Shape, tuple[Unit, Entry]]] = {}
        for unit in self.plan.units:
            for entry in unit.entries:
                found.setdefault(entry.tensor, {})[entry.index] = unit, entry
        return found

    def read(self, name: str, offsets: Shape, sizes: Shape, dtype: str | None = None) -> Bytes:
        """The box of `sizes` from `offsets` on, in elements of the target: [*sizes, bytes of an element].

        Values have the target's dtype, or are cast to `dtype`. Raises CoverageError where the plan makes none.
        """
        draft = self.drafts.get(name)
        if draft is None:
            raise CoverageError(f"the plan makes no tensor `{name}`")
        dtype, makers = dtype or draft.dtype, self._makers.get(name, {})
        out = np.empty((*sizes, DTYPE_BITS[dtype] // 8), np.uint8)
        depth = len(next(iter(makers), ()))
        for at in product(*map(range, sizes[:depth])):
            index = tuple(first + step for first, step in zip(offsets, at, strict=False))
            if index not in makers:
                raise CoverageError(f"the plan makes nothing of `{name}` {list(index)}")
            if (box := out[at]).size:
                target = StoredTensor.whole(name, dtype, draft.shape[depth:], name, 0)
                self._make(*makers[index], target, _Window(target, offsets[depth:], box))
        return out

    def read_rows(self, name: str, index: Shape, row: int, rows: int, dtype: str | None = None) -> Bytes:
        """Rows `[row, row + rows)` of the entry at `index` of the leading dimensions: [rows, bytes of a row]."""
        out = self.read(name, *box_of_rows(self.drafts[name].shape, index, row, rows), dtype)
        return out.reshape(rows, math.prod(out.shape[len(index) + 1 : -1]) * out.shape[-1])

    def _make(self, unit: Unit, entry: Entry, target: StoredTensor, window: _Window) -> None:
        """Make those rows of an entry that a window sees, as the tensor `target`."""
        engine = _Alone(self._cut_out(unit, entry, target), target, self.source, window, self.max_memory)
        low, high = window.first * entry.fold, window.last * entry.fold
        pieces = [p for p in engine.pieces if p.entry is None or (p.row < high and p.row + p.rows > low)]
        need = BUFFERS * engine.cutting.piece_bytes + max((piece.memory_bytes for piece in pieces), default=0)
        taken = self._gate.acquire(need)
        try:
            engine.carry_out(pieces)
        finally:
            self._gate.release(taken)

    def _cut_out(self, unit: Unit, entry: Entry, target: StoredTensor) -> Plan:
        """The plan of one entry alone, stack and all else left away: an engine begins at the price of its chunks."""
        moves = moves_into(unit, entry)
        alone = tuple(replace(move, target=replace(move.target, index=())) for move in moves)
        update = self.plan.updates.get((entry.tensor, entry.index))
        indices: dict[str, set[Shape]] = {}
        for move in moves:
            indices.setdefault(move.source.tensor, set()).add(move.source.index)
        sources = {name: self._holding(name, wanted) for name, wanted in indices.items()}
        if unit.original is not None:
            sources[unit.original] = self.plan.sources[unit.original]
        return replace(
            self.plan,
            sources=sources if update is None else self.plan.sources,
            drafts=(Draft(target.name, target.dtype, target.shape, ()),),
            units=(Unit(unit.row, alone, (Entry(target.name, (), entry.fold),), unit.shift, unit.original),),
            updates={} if update is None else {(target.name, ()): update},
        )

    def _holding(self, name: str, indices: Collection[Shape]) -> StoredTensor:
        """A source with those of its chunks that hold some entries."""
        tensor = self.plan.sources[name]
        depth = len(next(iter(indices)))
        if not depth:
            return tensor
        grid = self._grids.get((name, depth)) or self._grids.setdefault((name, depth), TensorGrid(tensor, depth))
        numbers = {number for index in indices for number in grid.holding(index)}
        return replace(tensor, chunks=tuple(tensor.chunks[number] for number in sorted(numbers)))


class _Alone(Engine):
    """An engine for one target that works in its caller's thread."""

    def __init__(self, plan: Plan, target: StoredTensor, source: Source, sink: _Window, max_memory: int) -> None:
        super().__init__(plan, {target.name: target}, source, sink, workers=1, max_memory=max_memory)
        self.relay = _WholeRows(self.geometry, source, sink)

    def carry_out(self, pieces: Collection[Piece]) -> None:
        """Carry out some pieces, one after the other."""
        buffers = Buffers(self.cutting.piece_bytes)
        for piece in pieces:
            self.carry(piece, buffers, lambda nbytes: None)


class _WholeRows(Relay):
    """Relays nothing: a window is written whole rows."""

    def stretches(self, unit: Unit, entry: Entry, row: int, rows: int) -> None:
        """None, whatever they are."""


class _Window:
    """A sink that keeps what lies in a box of its one tensor: `box` [*sizes, bytes of an element] from `offsets` on.

    It sees the rows `[first, last)`.
    """

    def __init__(self, target: StoredTensor, offsets: Shape, box: Bytes) -> None:
        shape = target.shape or (1,)
        self._row, self._box = (*shape[1:], box.shape[-1]), box if target.shape else box[None]
        self._inner = tuple(slice(at, at + size) for at, size in zip(offsets[1:], box.shape[1:-1], strict=True))
        self.first = offsets[0] if offsets else 0
        self.last = self.first + len(self._box)

    def data_start(self, chunk: Chunk) -> int:
        """The one chunk begins at 0."""
        return chunk.start

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Keep what lies in the window; whole rows are written."""
        rows = np.frombuffer(data, np.uint8).reshape(-1, *self._row)
        at = start // (len(data) // len(rows))
        low, high = max(at, self.first), min(at + len(rows), self.last)
        if low < high:
            seen = (slice(low - at, high - at), *self._inner)
            self._box[low - self.first : high - self.first] = rows[seen]

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Nothing surrounds it."""
