"""The reading half of the engine: target rows, made from where the source keeps them.

Where bytes only move they are read straight into target order, and no tensor is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from converters.casts import restore
from converters.codecs.decode import Words, read_decoded
from converters.engine.pieces import Geometry, moves_into
from converters.engine.plan import Entry, Unit
from converters.engine.regions import Move, Region, matrix
from converters.engine.selected import read_picked
from converters.engine.workers import Buffers, Matrix
from converters.errors import StorageError
from converters.protocols import Source
from converters.rows.pack import Rows, Slot
from converters.stored import fresh, read_strided
from converters.tensors import DTYPE_BITS

#: A source matrix: its tensor and the entry of its stack.
MatrixId = tuple[str, tuple[int, ...]]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Rows are copied run by run up to this many runs, by an index array beyond.
_FEW_RUNS = 64


class Reader:
    """Reads rows of target entries, in the dtype the source has them in. Used by many threads at once."""

    def __init__(self, geometry: Geometry, source: Source) -> None:
        self.geometry, self.source, self.plan = geometry, source, geometry.plan

    def gather(self, unit: Unit, entry: Entry, row: int, rows: int, buffers: Buffers) -> Matrix:
        """Target rows `[row, row + rows)` in the source dtype, shape [rows, bytes of a row]."""
        moves = moves_into(unit, entry)
        width = self.geometry.entry_matrix(entry)[1] * (DTYPE_BITS[self.geometry.origin(unit, entry)] // 8)
        out = buffers.take("gathered", rows, width)
        filled = 0

        def strip(nbytes: int) -> Matrix:
            return buffers.take("strip", 1, nbytes).reshape(-1)

        for move in moves:
            for origin, at, count in move.runs().within(row, rows):
                self._read(move.source, origin, out[at - row : at - row + count], strip)
                filled += count
        if filled < rows:
            _zero_gaps(moves, out, row, rows)
        return out

    def _read(self, region: Region, row: int, out: Matrix, strip: Callable[[int], Matrix] = fresh) -> None:
        """Rows `[row, row + len(out))` of a region's matrix into `out`."""
        if region.tensor in self.plan.encoded:
            decoded = self._decoded(region, row, len(out))
            out.view(decoded.dtype)[:] = decoded
            return
        if region.tensor in self.plan.selected:
            out[:] = self._chosen(region, row, len(out))
            return
        item = DTYPE_BITS[self.plan.sources[region.tensor].dtype] // 8
        got = 0
        for extent, first, count in self.geometry.source_extents(region).overlap(row, len(out)):
            start = self.source.data_start(extent.chunk) + extent.start + (first - extent.row) * extent.pitch
            part = out[first - row : first - row + count, extent.col * item : (extent.col + extent.cols) * item]
            read_strided(self.source, extent.chunk.file, start, (extent.pitch, 1), part, strip)
            got += part.size
        if got != out.size:
            raise StorageError(f"`{region.tensor}`: {got} of {out.size} bytes of rows {row}… are stored")

    def _decoded(self, region: Region, row: int, rows: int) -> Words:
        """Rows `[row, row + rows)` of a tensor that a codec stores; it counts unfolded rows."""
        encoded = self.plan.encoded[region.tensor]
        first, last = row // region.fold, -(-(row + rows) // region.fold)
        decoded = read_decoded(self.source, encoded, region.index, first, last - first)
        skip = row - first * region.fold
        if region.fold > 1:
            decoded = decoded.reshape(len(decoded) * region.fold, -1)
        return decoded[skip : skip + rows]

    def _chosen(self, region: Region, row: int, rows: int) -> Matrix:
        """Rows `[row, row + rows)` of a tensor that is a choice of others."""
        if region.fold > 1:
            raise StorageError(f"`{region.tensor}` is a choice of columns, and is cut by columns too")
        picked = self.plan.selected[region.tensor].entries[region.index]
        at_once = bool(picked.index) and picked.tensor in self.plan.encoded
        return read_picked(picked, self.plan.sources[picked.tensor], row, rows, self._read, at_once=at_once)

    def load(self, unit: Unit) -> dict[MatrixId, Words]:
        """Each source matrix of a unit, read once, as words of the element size, transposition undone."""
        loaded: dict[MatrixId, Words] = {}
        for move in unit.moves:
            region = move.source
            if (region.tensor, region.index) in loaded:
                continue
            tensor = self.plan.sources[region.tensor]
            item = DTYPE_BITS[tensor.dtype] // 8
            rows, cols = matrix(tensor.shape, len(region.index), region.fold)
            if region.tensor in self.plan.encoded:
                words = self._decoded(region, 0, rows)
            else:
                raw = np.empty((rows, cols * item), np.uint8)
                self._read(region, 0, raw)
                words = raw.view(_WORDS[item])
            loaded[region.tensor, region.index] = words.T if region.transposed else words
        return loaded

    def assemble(self, unit: Unit, entry: Entry, loaded: Mapping[MatrixId, Words]) -> Matrix:
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
                first, count = int(runs.target[0]), int(runs.length.sum())
                wanted = _rows_of(runs.source, runs.length)
                if source.flags.c_contiguous and runs.target[-1] + runs.length[-1] == first + count:
                    # Ten times as fast as indexing. Clipping changes no index, and spares NumPy a copy of the result.
                    np.take(source, wanted, axis=0, out=out[first : first + count], mode="clip")
                else:
                    out[_rows_of(runs.target, runs.length)] = source[wanted]
            else:
                for s, t, n in zip(runs.source.tolist(), runs.target.tolist(), runs.length.tolist(), strict=True):
                    out[t : t + n] = source[s : s + n]
        if filled < len(out):
            _zero_gaps(moves, out, 0, len(out))
        stored = np.ascontiguousarray(out.T) if flipped else out
        return stored.view(np.uint8).reshape(rows, -1)

    def restored(self, unit: Unit, row: int, stored: Matrix, changed: Matrix, dtype: str) -> Matrix:
        """`changed`, with the original value wherever that is what the stored one came from."""
        assert unit.original is not None
        tensor = self.plan.sources[unit.original]
        count = matrix(tensor.shape, 0)[0]
        original = np.empty_like(changed)
        self._read(Region(unit.original, (), Slot.whole(count)), row, original)
        return restore(original, tensor.dtype, stored, dtype, changed, -unit.shift)


def _rows_of(start: Rows, length: Rows) -> Rows:
    """Every row number of some runs, run by run."""
    rows: Rows = np.arange(int(length.sum())) + np.repeat(start - (np.cumsum(length) - length), length)
    return rows


def _zero_gaps(moves: Sequence[Move], out: Words, row: int, rows: int) -> None:
    """Zero the rows of `out`, target rows from `row` on, that no move reaches."""
    reached = np.zeros(rows, bool)
    for move in moves:
        runs = move.runs()
        for target, length in zip(runs.target.tolist(), runs.length.tolist(), strict=True):
            reached[max(0, target - row) : max(0, target + length - row)] = True
    out[~reached] = 0
