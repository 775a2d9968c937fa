"""The engine: carries out a plan piece by piece, in parallel, within a fixed amount of memory.

A piece reads the source bytes of some target rows, changes values where the plan says so, and writes the
rows where the target keeps them. Every source byte is read once, every target byte written once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from converters.casts import convert, overflown
from converters.checksums import combine, crc32
from converters.codecs.encode import encode_rows
from converters.engine.pieces import Cutting, Geometry, Part, Piece, cut
from converters.engine.plan import Entry, Plan, Unit
from converters.engine.reading import Reader
from converters.engine.relay import Relay
from converters.engine.threads import run_threads
from converters.engine.workers import Buffers, Matrix, MemoryGate, PieceQueue
from converters.errors import StorageError, UsageError
from converters.protocols import Sink, Source
from converters.tensors import DTYPE_BITS, StoredTensor, nbytes_of

if TYPE_CHECKING:
    from converters.engine.lowrank import Factors

ChunkId = tuple[str, int]
#: Called with the number of a piece whose bytes are written, and the CRC-32 of each of its parts.
Done = Callable[[int, Sequence[int]], None]


class Engine:
    """One run of a plan into `targets`, the plan's drafts with every chunk's place in its file.

    `cutting` is that of an interrupted run which this one continues; by default it follows from the memory.
    `progress` and `done` are called from worker threads, several at a time.
    """

    def __init__(
        self,
        plan: Plan,
        targets: Mapping[str, StoredTensor],
        source: Source,
        sink: Sink,
        *,
        workers: int,
        max_memory: int,
        cutting: Cutting | None = None,
    ) -> None:
        self.plan, self.targets, self.sink = plan, targets, sink
        self.workers = max(1, workers)
        self.cutting = cutting or Cutting.for_memory(max_memory, self.workers)
        self.gate = MemoryGate(Cutting.for_memory(max_memory, self.workers).whole_bytes)
        self.geometry = Geometry(plan, targets)
        self.reader = Reader(self.geometry, source)
        self.relay = Relay(self.geometry, source, sink)
        self.factors = self._factors(source)
        self.pieces = cut(self.geometry, self.cutting)
        self.crcs = {name: [0] * len(tensor.chunks) for name, tensor in targets.items()}
        self._parts: dict[ChunkId, list[tuple[int, int, int]]] = {}
        self._left: dict[ChunkId, int] = {
            (name, number): nbytes_of(tensor.dtype, chunk.sizes)
            for name, tensor in targets.items()
            for number, chunk in enumerate(tensor.chunks)
        }
        self._lock = threading.Lock()

    def _factors(self, source: Source) -> Factors | None:
        if not self.plan.updates:
            return None
        from converters.engine.lowrank import Factors

        return Factors(source, self.plan.sources)

    def run(self, progress: Callable[[int], None] = lambda _: None) -> dict[str, list[int]]:
        """Carry out all pieces; returns the CRC-32 of each chunk of each target tensor."""
        self.work(self.pieces, progress)
        return self.checksums()

    def work(
        self,
        pieces: Collection[Piece],
        progress: Callable[[int], None] = lambda _: None,
        done: Done = lambda number, crcs: None,
    ) -> None:
        """Carry out some pieces; the first failure of any worker stops the others and is raised."""
        queue = PieceQueue(pieces)

        def worker(stop: threading.Event) -> None:
            buffers, piece = Buffers(self.cutting.piece_bytes), None
            while not stop.is_set() and (piece := queue.take(piece)) is not None:
                taken = self.gate.acquire(piece.memory_bytes)
                try:
                    done(piece.number, self.carry(piece, buffers, progress))
                finally:
                    self.gate.release(taken)

        count = min(self.workers, len(pieces))
        in_torch = bool(self.plan.encoded or self.plan.reencoded or self.plan.updates)
        run_threads(worker, count, "mbx", torch_too=count > 1 and in_torch)

    def absorb(self, finished: Mapping[int, Sequence[int]]) -> int:
        """Take over pieces that another process or an earlier run wrote, by number with the CRCs that `done` got.

        Returns their bytes. Raises StorageError when they do not fit the plan.
        """
        nbytes = 0
        for number, crcs in finished.items():
            parts = list(self.geometry.parts(self.pieces[number])) if 0 <= number < len(self.pieces) else []
            if len(parts) != len(crcs) or number >= len(self.pieces):
                raise StorageError(f"the journal's piece {number} is not one of this run's {len(self.pieces)}")
            for part, crc in zip(parts, crcs, strict=True):
                self._note(part, crc)
                nbytes += part.nbytes
        return nbytes

    def checksums(self) -> dict[str, list[int]]:
        """The CRC-32 of each chunk of each target tensor, once all pieces are carried out or absorbed."""
        for (name, number), nbytes in self._left.items():
            tensor = self.targets[name]
            if nbytes:
                raise AssertionError(f"the plan left {nbytes} bytes of `{name}` chunk {number} unwritten")
            if not nbytes_of(tensor.dtype, tensor.chunks[number].sizes):
                self.sink.finish_chunk(tensor.dtype, tensor.chunks[number], 0)
        return self.crcs

    # --- one piece ---------------------------------------------------------------------------------------------

    def carry(self, piece: Piece, buffers: Buffers, progress: Callable[[int], None]) -> list[int]:
        """Carry out one piece, `buffers` this thread's own; returns the CRC-32 of each of its parts."""
        unit = piece.unit
        if piece.entry is not None:
            entry, row, rows = piece.entry, piece.row, piece.rows
            if (stretches := self.relay.stretches(unit, entry, row, rows)) is not None:
                crcs = []
                for part in self.geometry.entry_parts(entry, row, rows):
                    crcs.append(self._written(part, self.relay.carry(stretches, part, buffers), progress))
                return crcs
            data = self.reader.gather(unit, entry, row, rows, buffers)
            return self._put(unit, entry, row, data, buffers, progress)
        loaded = self.reader.load(unit)
        crcs = []
        for entry in unit.entries:
            crcs += self._put(unit, entry, 0, self.reader.assemble(unit, entry, loaded), buffers, progress)
        return crcs

    # --- writing -----------------------------------------------------------------------------------------------

    def _put(
        self, unit: Unit, entry: Entry, row: int, data: Matrix, buffers: Buffers, progress: Callable[[int], None]
    ) -> list[int]:
        """Convert and write target rows from `row` on; returns the CRC-32 of each part written."""
        if entry.tensor in self.plan.reencoded:
            return self._put_encoded(unit, entry, row, data, progress)
        tensor = self.targets[entry.tensor]
        origin = self.geometry.origin(unit, entry)
        rows = len(data)
        update = self.plan.updates.get((entry.tensor, entry.index))
        if update is not None and self.factors is not None:
            data = update.apply(self.factors, data, row, origin, tensor.dtype)
        elif data.size and (unit.shift or origin != tensor.dtype):
            width = data.shape[1] * DTYPE_BITS[tensor.dtype] // DTYPE_BITS[origin]
            out = buffers.take("changed", rows, width).reshape(-1)
            changed = convert(data, origin, tensor.dtype, unit.shift, out).reshape(rows, -1)
            if tensor.dtype == "F16" and (lost := overflown(changed, data, origin)):
                raise UsageError(
                    f"`{entry.tensor}`: {lost} value(s) are beyond fp16's range, 65504, and would be infinite",
                    hint="‹dtype› bf16 keeps the range, ‹dtype› fp32 every value",
                )
            data = self.reader.restored(unit, row, data, changed, origin) if unit.original else changed
        item = DTYPE_BITS[tensor.dtype] // 8
        crcs = []
        for part in self.geometry.entry_parts(entry, row, rows):
            extent = part.extent
            stored = data[part.row - row : part.row - row + part.rows]
            if extent.pitch != data.shape[1]:
                packed = buffers.take("packed", part.rows, extent.pitch)
                packed[:] = stored[:, extent.col * item : (extent.col + extent.cols) * item]
                stored = packed
            crcs.append(self._write(part, stored.reshape(-1).data, progress))
        return crcs

    def _put_encoded(
        self, unit: Unit, entry: Entry, row: int, data: Matrix, progress: Callable[[int], None]
    ) -> list[int]:
        """The same for a tensor that a codec stores; its rows are unfolded ones."""
        plan, rows = self.plan, len(data) // entry.fold
        dtype = self.geometry.origin(unit, entry)
        update = plan.updates.get((entry.tensor, entry.index))
        if update is not None and self.factors is not None:
            data, dtype = update.apply(self.factors, data, row, dtype, "F32"), "F32"
        stored = encode_rows(
            self.reader.source,
            plan.reencoded[entry.tensor],
            plan.scales.get(entry.tensor, {}),
            entry.index,
            row // entry.fold,
            data.reshape(rows, -1),
            dtype,
        )
        parts = self.geometry.entry_parts(entry, row, len(data))
        return [self._write(part, flat.data, progress) for part, flat in zip(parts, stored, strict=True)]

    def _write(self, part: Part, flat: memoryview, progress: Callable[[int], None]) -> int:
        crc = crc32(flat)
        self.sink.write(part.extent.chunk.file, self.sink.data_start(part.extent.chunk) + part.offset, flat)
        return self._written(part, crc, progress)

    def _written(self, part: Part, crc: int, progress: Callable[[int], None]) -> int:
        self._note(part, crc)
        progress(part.nbytes)
        return crc

    def _note(self, part: Part, crc: int) -> None:
        """Count a written part; a chunk that is complete gets its CRC and is finished."""
        name, number = part.tensor, part.extent.number
        with self._lock:
            parts = self._parts.setdefault((name, number), [])
            parts.append((part.offset, part.nbytes, crc))
            self._left[name, number] -= part.nbytes
            left = self._left[name, number]
            if left == 0:
                del self._parts[name, number]
        if left < 0:
            raise AssertionError(f"`{name}` chunk {number} was written twice")
        if left == 0:
            parts.sort()
            whole = 0
            for _, nbytes, crc in parts:
                whole = combine(whole, crc, nbytes)
            self.crcs[name][number] = whole
            self.sink.finish_chunk(self.targets[name].dtype, part.extent.chunk, whole)
