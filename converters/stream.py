"""The engine: carries out a plan piece by piece, in parallel, within a fixed amount of memory.

A piece reads the source bytes of some target rows, changes values where the plan says so, and writes the
rows where the target keeps them. Where bytes only move, they are read straight into target order and no
tensor is built. Every source byte is read once, every target byte written once.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from converters.crc import combine
from converters.decode import read_decoded
from converters.errors import StorageError
from converters.pack import Slot
from converters.pieces import Cutting, Geometry, Part, Piece, cut, moves_into
from converters.plan import Entry, Plan, Unit
from converters.protocols import Sink, Source
from converters.regions import Move, Region, matrix
from converters.tensors import DTYPE_BITS, StoredTensor, nbytes_of
from converters.workers import Buffers, Matrix, MemoryGate, PieceQueue

Words = npt.NDArray[np.generic]
ChunkId = tuple[str, int]
#: Called with the number of a piece whose bytes are written, and the CRC-32 of each of its parts.
Done = Callable[[int, Sequence[int]], None]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Rows are copied run by run up to this many runs, by an index array beyond.
_FEW_RUNS = 64


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
        self.plan, self.targets, self.source, self.sink = plan, targets, source, sink
        self.workers = max(1, workers)
        self.cutting = cutting or Cutting.for_memory(max_memory, self.workers)
        self.gate = MemoryGate(Cutting.for_memory(max_memory, self.workers).whole_bytes)
        self.geometry = Geometry(plan, targets)
        self.pieces = cut(self.geometry, self.cutting)
        self.crcs = {name: [0] * len(tensor.chunks) for name, tensor in targets.items()}
        self._parts: dict[ChunkId, list[tuple[int, int, int]]] = {}
        self._left: dict[ChunkId, int] = {
            (name, number): nbytes_of(tensor.dtype, chunk.sizes)
            for name, tensor in targets.items()
            for number, chunk in enumerate(tensor.chunks)
        }
        self._lock = threading.Lock()

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
        queue, failures, stop = PieceQueue(pieces), list[BaseException](), threading.Event()

        def worker() -> None:
            buffers, piece = Buffers(self.cutting.piece_bytes), None
            try:
                while not stop.is_set() and (piece := queue.take(piece)) is not None:
                    taken = self.gate.acquire(piece.memory_bytes)
                    try:
                        done(piece.number, self._carry(piece, buffers, progress))
                    finally:
                        self.gate.release(taken)
            except BaseException as error:  # handed to the caller below
                failures.append(error)
                stop.set()

        threads = [
            threading.Thread(target=worker, name=f"mbx-{n}", daemon=True)
            for n in range(min(self.workers, len(pieces)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            stop.set()
            for thread in threads:
                thread.join()
            raise
        if failures:
            raise failures[0]

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

    def _carry(self, piece: Piece, buffers: Buffers, progress: Callable[[int], None]) -> list[int]:
        unit = piece.unit
        if piece.entry is not None:
            data = self._gather(unit, piece.entry, piece.row, piece.rows, buffers)
            return self._put(unit, piece.entry, piece.row, data, buffers, progress)
        loaded = self._load_sources(unit)
        crcs = []
        for entry in unit.entries:
            crcs += self._put(unit, entry, 0, self._assemble(unit, entry, loaded), buffers, progress)
        return crcs

    def _gather(self, unit: Unit, entry: Entry, row: int, rows: int, buffers: Buffers) -> Matrix:
        """Target rows `[row, row + rows)` in the source dtype, shape [rows, bytes of a row]."""
        moves = moves_into(unit, entry)
        width = self.geometry.entry_matrix(entry)[1] * (DTYPE_BITS[self.geometry.origin(unit, entry)] // 8)
        out = buffers.take("gathered", rows, width)
        filled = 0
        for move in moves:
            runs = move.runs()
            last = int(np.searchsorted(runs.target, row + rows))
            first = max(0, int(np.searchsorted(runs.target, row, side="right")) - 1)
            for i in range(first, last):
                start = max(row, int(runs.target[i]))
                stop = min(row + rows, int(runs.target[i] + runs.length[i]))
                if start < stop:
                    origin = int(runs.source[i]) + start - int(runs.target[i])
                    self._read(move.source, origin, out[start - row : stop - row], buffers)
                    filled += stop - start
        if filled < rows:
            _zero_gaps(moves, out, row, rows)
        return out

    def _read(self, region: Region, row: int, out: Matrix, buffers: Buffers | None) -> None:
        """Rows `[row, row + len(out))` of a region's matrix into `out`."""
        if region.tensor in self.plan.encoded:
            self._read_encoded(region, row, out)
            return
        item = DTYPE_BITS[self.plan.sources[region.tensor].dtype] // 8
        got = 0
        for extent, first, count in self.geometry.source_extents(region).overlap(row, len(out)):
            start = self.source.data_start(extent.chunk) + extent.start + (first - extent.row) * extent.pitch
            part = out[first - row : first - row + count]
            if extent.pitch == out.shape[1]:
                if part.size:
                    self.source.read_into(extent.chunk.file, start, part.reshape(-1).data)
            elif extent.pitch:
                strip = np.empty((count, extent.pitch), np.uint8)
                if buffers is not None:
                    strip = buffers.take("strip", count, extent.pitch)
                self.source.read_into(extent.chunk.file, start, strip.reshape(-1).data)
                part[:, extent.col * item : (extent.col + extent.cols) * item] = strip
            got += count * extent.pitch
        if got != out.size:
            raise StorageError(f"`{region.tensor}`: {got} of {out.size} bytes of rows {row}… are stored")

    def _read_encoded(self, region: Region, row: int, out: Matrix) -> None:
        """The same for a tensor that a codec stores; it counts unfolded rows."""
        encoded = self.plan.encoded[region.tensor]
        first, last = row // region.fold, -(-(row + len(out)) // region.fold)
        decoded = read_decoded(self.source, encoded, region.index, first, last - first)
        skip = row - first * region.fold
        out[:] = decoded.reshape(-1, out.shape[1])[skip : skip + len(out)]

    def _load_sources(self, unit: Unit) -> dict[tuple[str, tuple[int, ...]], Words]:
        """Each source matrix of a unit, read once, as words of the element size, transposition undone."""
        loaded: dict[tuple[str, tuple[int, ...]], Words] = {}
        for move in unit.moves:
            region = move.source
            if (region.tensor, region.index) in loaded:
                continue
            tensor = self.plan.sources[region.tensor]
            item = DTYPE_BITS[tensor.dtype] // 8
            rows, cols = matrix(tensor.shape, len(region.index), region.fold)
            raw = np.empty((rows, cols * item), np.uint8)
            self._read(region, 0, raw, None)
            words = raw.view(_WORDS[item])
            loaded[region.tensor, region.index] = words.T if region.transposed else words
        return loaded

    def _assemble(self, unit: Unit, entry: Entry, loaded: Mapping[tuple[str, tuple[int, ...]], Words]) -> Matrix:
        """All rows of one target entry from matrices in memory."""
        moves = moves_into(unit, entry)
        rows, cols = self.geometry.entry_matrix(entry)
        word = _WORDS[DTYPE_BITS[self.geometry.origin(unit, entry)] // 8]
        flipped = any(move.target.transposed for move in moves)
        out = np.empty((cols, rows) if flipped else (rows, cols), word)
        filled = 0
        for move in moves:
            source, runs = loaded[move.source.tensor, move.source.index], move.runs()
            filled += int(runs.length.sum())
            if len(runs) > _FEW_RUNS:
                spread = np.arange(int(runs.length.sum())) - np.repeat(
                    np.cumsum(runs.length) - runs.length, runs.length
                )
                out[np.repeat(runs.target, runs.length) + spread] = source[
                    np.repeat(runs.source, runs.length) + spread
                ]
            else:
                for s, t, n in zip(runs.source.tolist(), runs.target.tolist(), runs.length.tolist(), strict=True):
                    out[t : t + n] = source[s : s + n]
        if filled < len(out):
            _zero_gaps(moves, out, 0, len(out))
        stored = np.ascontiguousarray(out.T) if flipped else out
        return stored.view(np.uint8).reshape(rows, -1)

    # --- writing -----------------------------------------------------------------------------------------------

    def _put(
        self, unit: Unit, entry: Entry, row: int, data: Matrix, buffers: Buffers, progress: Callable[[int], None]
    ) -> list[int]:
        """Convert and write target rows from `row` on; returns the CRC-32 of each part written."""
        tensor = self.targets[entry.tensor]
        origin = self.geometry.origin(unit, entry)
        rows = len(data)
        if data.size and (unit.shift or origin != tensor.dtype):
            from converters.values import convert

            changed = convert(data, origin, tensor.dtype, unit.shift).reshape(rows, -1)
            data = self._restored(unit, row, data, changed, origin) if unit.original else changed
        item = DTYPE_BITS[tensor.dtype] // 8
        crcs = []
        for part in self.geometry.entry_parts(entry, row, rows):
            extent = part.extent
            stored = data[part.row - row : part.row - row + part.rows]
            if extent.pitch != data.shape[1]:
                packed = buffers.take("packed", part.rows, extent.pitch)
                packed[:] = stored[:, extent.col * item : (extent.col + extent.cols) * item]
                stored = packed
            flat = stored.reshape(-1).data
            crcs.append(zlib.crc32(flat))
            self.sink.write(extent.chunk.file, self.sink.data_start(extent.chunk) + part.offset, flat)
            self._note(part, crcs[-1])
            progress(part.nbytes)
        return crcs

    def _restored(self, unit: Unit, row: int, stored: Matrix, changed: Matrix, dtype: str) -> Matrix:
        """`changed`, with the original value wherever that is what the stored one came from."""
        from converters.values import restore

        assert unit.original is not None
        tensor = self.plan.sources[unit.original]
        count = matrix(tensor.shape, 0)[0]
        original = np.empty_like(changed)
        self._read(Region(unit.original, (), Slot.whole(count)), row, original, None)
        return restore(original, tensor.dtype, stored, dtype, changed, -unit.shift)

    def _note(self, part: Part, crc: int) -> None:
        """Count a written part; a chunk that is complete gets its CRC and is finished."""
        name, number = part.entry.tensor, part.extent.number
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


def _zero_gaps(moves: Sequence[Move], out: Words, row: int, rows: int) -> None:
    """Zero the rows of `out`, target rows from `row` on, that no move reaches."""
    reached = np.zeros(rows, bool)
    for move in moves:
        runs = move.runs()
        for target, length in zip(runs.target.tolist(), runs.length.tolist(), strict=True):
            reached[max(0, target - row) : max(0, target + length - row)] = True
    out[~reached] = 0
