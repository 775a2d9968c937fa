"""The engine: carries out a plan piece by piece, in parallel, within a fixed amount of memory.

A piece reads the source bytes of some target rows, changes values where the plan says so, and writes the
rows where the target keeps them. Where bytes only move, they are read straight into target order and no
tensor is built. Every source byte is read once.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.crc import combine
from converters.decode import read_decoded
from converters.errors import DeviceError, StorageError
from converters.plan import Entry, Plan, Unit
from converters.protocols import Sink, Source
from converters.regions import Extent, Move, Region, TensorGrid, matrix, overlap
from converters.tensors import DTYPE_BITS, StoredTensor, nbytes_of

MIB = 1 << 20
_LARGEST_PIECE = 32 * MIB
#: Below this many bytes a run, reading runs one by one costs more than reading around them.
_FINE_RUN = 64 * 1024

Matrix = npt.NDArray[np.uint8]
ChunkId = tuple[str, int]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[row, row + rows)` of one target entry, or, with `entry` None, a whole unit at once."""

    unit: Unit
    entry: Entry | None
    row: int
    rows: int
    memory_bytes: int


class MemoryGate:
    """Lets pieces start while their declared bytes fit; one piece alone may always run."""

    def __init__(self, max_bytes: int) -> None:
        self._free = self._max = max_bytes
        self._changed = threading.Condition()

    def acquire(self, amount: int) -> int:
        """Wait until `amount` (at most the whole gate) is free and take it; returns what was taken."""
        amount = min(amount, self._max)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        return amount

    def release(self, amount: int) -> None:
        """Give back what `acquire` returned."""
        with self._changed:
            self._free += amount
            self._changed.notify_all()


class Engine:
    """One run of a plan into `targets`, the plan's drafts with every chunk's place in its file."""

    def __init__(
        self, plan: Plan, targets: Mapping[str, StoredTensor], source: Source, sink: Sink, *, workers: int, max_memory: int
    ) -> None:
        self.plan, self.targets, self.source, self.sink = plan, targets, source, sink
        self.workers = max(1, workers)
        self.gate = MemoryGate(max_memory)
        self.max_memory = max_memory
        self.piece_bytes = max(MIB, min(_LARGEST_PIECE, max_memory // (self.workers * 4)))
        self._grids: dict[tuple[int, str, int], TensorGrid] = {}
        self._parts: dict[ChunkId, list[tuple[int, int, int]]] = {}
        self._left: dict[ChunkId, int] = {
            (name, number): nbytes_of(tensor.dtype, chunk.sizes)
            for name, tensor in targets.items()
            for number, chunk in enumerate(tensor.chunks)
        }
        self._lock = threading.Lock()

    # --- what a piece is ---------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """Every piece of the plan, in target order."""
        for unit in self.plan.units:
            item = self._source_item(unit)
            sizes = {}
            for entry in unit.entries:
                rows, cols = matrix(self.targets[entry.tensor].shape, len(entry.index), entry.fold)
                sizes[entry] = (rows, cols * item)
            total = sum(rows * row_bytes for rows, row_bytes in sizes.values())
            transposed = any(move.source.transposed or move.target.transposed for move in unit.moves)
            if transposed and 3 * total > self.max_memory:
                raise DeviceError(
                    f"`{unit.row}` is transposed and needs {3 * total // MIB} MiB at once",
                    hint=f"raise --max-memory to {3 * total // MIB + 1}MiB",
                )
            if transposed or (self._is_fine(unit) and 3 * total <= self.max_memory):
                yield Piece(unit, None, 0, 0, 3 * total)
                continue
            factor = 4 if self._changes_values(unit) else 1
            for entry, (rows, row_bytes) in sizes.items():
                step = max(1, self.piece_bytes // factor // max(1, row_bytes))
                for row in range(0, rows, step):
                    count = min(step, rows - row)
                    yield Piece(unit, entry, row, count, count * row_bytes * factor)

    def _is_fine(self, unit: Unit) -> bool:
        """Whether reading run by run would mean many small reads."""
        for move in unit.moves:
            runs = move.runs()
            row_bytes = self._source_row_bytes(move.source)
            if len(runs) > 1 and runs.shortest * row_bytes < _FINE_RUN:
                return True
        return False

    def _source_item(self, unit: Unit) -> int:
        name = unit.moves[0].source.tensor if unit.moves else unit.entries[0].tensor
        tensor = self.plan.sources[name] if unit.moves else self.targets[name]
        return DTYPE_BITS[tensor.dtype] // 8

    def _source_row_bytes(self, region: Region) -> int:
        tensor = self.plan.sources[region.tensor]
        return matrix(tensor.shape, len(region.index), region.fold)[1] * (DTYPE_BITS[tensor.dtype] // 8)

    def _changes_values(self, unit: Unit) -> bool:
        return bool(unit.shift) or any(
            self.plan.sources[m.source.tensor].dtype != self.targets[m.target.tensor].dtype for m in unit.moves
        )

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[int], None] = lambda _: None) -> dict[str, list[int]]:
        """Carry out all pieces; returns the CRC-32 of each chunk of each target tensor.

        The first failure of any worker stops the others and is raised.
        """
        crcs = {name: [0] * len(tensor.chunks) for name, tensor in self.targets.items()}
        for (name, number), left in self._left.items():
            if left == 0:
                self._finish(name, number, 0, crcs)
        queue, failures, stop = self.pieces(), [], threading.Event()
        queue_lock = threading.Lock()

        def work() -> None:
            while not stop.is_set():
                try:
                    with queue_lock:
                        piece = next(queue, None)
                    if piece is None:
                        return
                    taken = self.gate.acquire(piece.memory_bytes)
                    try:
                        self._carry(piece, crcs, progress)
                    finally:
                        self.gate.release(taken)
                except BaseException as error:  # handed to the caller below
                    failures.append(error)
                    stop.set()

        threads = [threading.Thread(target=work, name=f"mbx-{n}", daemon=True) for n in range(self.workers)]
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
        if unwritten := [f"{name} chunk {number}" for (name, number), left in self._left.items() if left]:
            raise AssertionError(f"the plan left {len(unwritten)} chunk(s) unwritten: {unwritten[0]}")
        return crcs

    def _carry(self, piece: Piece, crcs: dict[str, list[int]], progress: Callable[[int], None]) -> None:
        if piece.entry is not None:
            data = self._gather(piece.unit, piece.entry, piece.row, piece.rows)
            self._put(piece.unit, piece.entry, piece.row, data, crcs, progress)
            return
        loaded = self._load_sources(piece.unit)
        for entry in piece.unit.entries:
            self._put(piece.unit, entry, 0, self._assemble(piece.unit, entry, loaded), crcs, progress)

    # --- reading -----------------------------------------------------------------------------------------------

    def _gather(self, unit: Unit, entry: Entry, row: int, rows: int) -> Matrix:
        """Target rows `[row, row + rows)` in the source dtype, shape [rows, bytes of a row]."""
        moves = _into(unit, entry)
        width = matrix(self.targets[entry.tensor].shape, len(entry.index), entry.fold)[1] * self._source_item(unit)
        out = np.empty((rows, width), np.uint8)
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
                    self._read(move.source, origin, out[start - row : stop - row])
                    filled += stop - start
        if filled < rows:
            self._zero_gaps(moves, out, row, rows)
        return out

    @staticmethod
    def _zero_gaps(moves: Sequence[Move], out: Matrix, row: int, rows: int) -> None:
        reached = np.zeros(rows, bool)
        for move in moves:
            runs = move.runs()
            for target, length in zip(runs.target.tolist(), runs.length.tolist(), strict=True):
                reached[max(0, target - row) : max(0, target + length - row)] = True
        out[~reached] = 0

    def _extents(self, tensor: StoredTensor, side: int, index: tuple[int, ...], fold: int) -> list[Extent]:
        key = (side, tensor.name, len(index))
        grid = self._grids.get(key)
        if grid is None:
            grid = self._grids[key] = TensorGrid(tensor, len(index))
        return grid.extents(index, fold)

    def _read(self, region: Region, row: int, out: Matrix) -> None:
        """Rows `[row, row + len(out))` of a region's matrix into `out`."""
        if (encoded := self.plan.encoded.get(region.tensor)) is not None:
            out[:] = read_decoded(self.source, encoded, region.index, row, len(out))
            return
        tensor = self.plan.sources[region.tensor]
        extents = self._extents(tensor, 0, region.index, region.fold)
        got = 0
        item = DTYPE_BITS[tensor.dtype] // 8
        for extent, first, count in overlap(extents, row, len(out)):
            start = self.source.data_start(extent.chunk) + extent.start + (first - extent.row) * extent.pitch
            part = out[first - row : first - row + count]
            if extent.pitch == out.shape[1]:
                if part.size:
                    self.source.read_into(extent.chunk.file, start, memoryview(part.reshape(-1)))
            else:
                rows = np.empty((count, extent.pitch), np.uint8)
                self.source.read_into(extent.chunk.file, start, memoryview(rows.reshape(-1)))
                part[:, extent.col * item : (extent.col + extent.cols) * item] = rows
            got += count * extent.pitch
        if got != out.size:
            raise StorageError(f"`{region.tensor}`: {got} of {out.size} bytes of rows {row}… are stored")

    def _load_sources(self, unit: Unit) -> dict[tuple[str, tuple[int, ...]], npt.NDArray[np.generic]]:
        """Each source matrix of a unit, read once, as words of the element size, transposition undone."""
        loaded: dict[tuple[str, tuple[int, ...]], npt.NDArray[np.generic]] = {}
        for move in unit.moves:
            region = move.source
            if (region.tensor, region.index) in loaded:
                continue
            tensor = self.plan.sources[region.tensor]
            item = DTYPE_BITS[tensor.dtype] // 8
            rows, cols = matrix(tensor.shape, len(region.index), region.fold)
            raw = np.empty((rows, cols * item), np.uint8)
            plain = Region(region.tensor, region.index, region.slot, False, region.fold)
            self._read(plain, 0, raw)
            words = raw.view(_WORDS[item])
            loaded[region.tensor, region.index] = words.T if region.transposed else words
        return loaded

    def _assemble(
        self, unit: Unit, entry: Entry, loaded: Mapping[tuple[str, tuple[int, ...]], npt.NDArray[np.generic]]
    ) -> Matrix:
        """All rows of one target entry from matrices in memory."""
        moves = _into(unit, entry)
        rows, cols = matrix(self.targets[entry.tensor].shape, len(entry.index), entry.fold)
        word = _WORDS[self._source_item(unit)]
        flipped = any(move.target.transposed for move in moves)
        out = np.zeros((cols, rows) if flipped else (rows, cols), word)
        for move in moves:
            source, runs = loaded[move.source.tensor, move.source.index], move.runs()
            if len(runs) > 64:
                spread = np.arange(int(runs.length.sum())) - np.repeat(np.cumsum(runs.length) - runs.length, runs.length)
                out[np.repeat(runs.target, runs.length) + spread] = source[np.repeat(runs.source, runs.length) + spread]
            else:
                for s, t, n in zip(runs.source.tolist(), runs.target.tolist(), runs.length.tolist(), strict=True):
                    out[t : t + n] = source[s : s + n]
        stored = np.ascontiguousarray(out.T) if flipped else out
        return stored.view(np.uint8).reshape(rows, -1)

    # --- writing -----------------------------------------------------------------------------------------------

    def _put(
        self,
        unit: Unit,
        entry: Entry,
        row: int,
        data: Matrix,
        crcs: dict[str, list[int]],
        progress: Callable[[int], None],
    ) -> None:
        """Convert and write target rows from `row` on, note their checksums, finish completed chunks."""
        tensor = self.targets[entry.tensor]
        moves = _into(unit, entry)
        origin = self.plan.sources[moves[0].source.tensor].dtype if moves else tensor.dtype
        if unit.shift or origin != tensor.dtype:
            from converters.values import convert

            data = convert(data, origin, tensor.dtype, unit.shift).reshape(len(data), -1)
        item = DTYPE_BITS[tensor.dtype] // 8
        for extent, first, count in overlap(self._extents(tensor, 1, entry.index, entry.fold), row, len(data)):
            part = data[first - row : first - row + count]
            if extent.pitch != data.shape[1]:
                part = np.ascontiguousarray(part[:, extent.col * item : (extent.col + extent.cols) * item])
            if not part.size:
                continue
            flat = memoryview(part.reshape(-1))
            offset = extent.start + (first - extent.row) * extent.pitch
            crc = zlib.crc32(flat)
            self.sink.write(extent.chunk.file, self.sink.data_start(extent.chunk) + offset, flat)
            self._note(entry.tensor, extent.number, offset, len(flat), crc, crcs)
            progress(len(flat))

    def _note(self, name: str, number: int, offset: int, nbytes: int, crc: int, crcs: dict[str, list[int]]) -> None:
        with self._lock:
            parts = self._parts.setdefault((name, number), [])
            parts.append((offset, nbytes, crc))
            self._left[name, number] -= nbytes
            left = self._left[name, number]
            if left == 0:
                del self._parts[name, number]
        if left < 0:
            raise AssertionError(f"`{name}` chunk {number} was written twice")
        if left == 0:
            parts.sort()
            whole = 0
            for _, length, part in parts:
                whole = combine(whole, part, length)
            self._finish(name, number, whole, crcs)

    def _finish(self, name: str, number: int, crc: int, crcs: dict[str, list[int]]) -> None:
        tensor = self.targets[name]
        crcs[name][number] = crc
        self.sink.finish_chunk(tensor.dtype, tensor.chunks[number], crc)


def _into(unit: Unit, entry: Entry) -> list[Move]:
    return [m for m in unit.moves if m.target.tensor == entry.tensor and m.target.index == entry.index]
