"""Rows whose bytes only move: carried from file to file in blocks that stay in a core's own cache."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from converters.checksums import crc32
from converters.engine.pieces import Geometry, Part, moves_into
from converters.engine.plan import Entry, Unit
from converters.engine.workers import Buffers
from converters.protocols import Sink, Source
from converters.tensors import DTYPE_BITS

#: Bytes read, summed and written at a time.
BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a source file that lie there as they will in the target."""

    file: str
    start: int
    nbytes: int


class Relay:
    """Carries rows that need no matrix. Used by many threads at once."""

    def __init__(self, geometry: Geometry, source: Source, sink: Sink) -> None:
        self.geometry, self.source, self.sink, self.plan = geometry, source, sink, geometry.plan

    def stretches(self, unit: Unit, entry: Entry, row: int, rows: int) -> deque[Stretch] | None:
        """Where the bytes of target rows `[row, row + rows)` lie, in their order; None where they do not only move."""
        plan, geometry = self.plan, self.geometry
        target, (_, cols) = geometry.target(entry), geometry.entry_matrix(entry)
        changed = unit.shift or unit.original or geometry.origin(unit, entry) != target.dtype
        if changed or entry.tensor in plan.reencoded or (entry.tensor, entry.index) in plan.updates:
            return None
        if any(extent.cols != cols for extent in geometry.target_extents(entry).items):
            return None
        at = row
        for part in geometry.entry_parts(entry, row, rows):
            if part.row != at:  # rows that several files hold, as ranks of a legacy checkpoint do
                return None
            at += part.rows
        found: list[tuple[int, Stretch]] = []
        pitch = cols * DTYPE_BITS[target.dtype] // 8
        for move in moves_into(unit, entry):
            if move.source.tensor in plan.encoded or move.source.tensor in plan.selected:
                return None
            extents = geometry.source_extents(move.source)
            for first, at, count in move.runs().within(row, rows):
                for extent, start, held in extents.overlap(first, count):
                    if extent.pitch != pitch:
                        return None
                    byte = self.source.data_start(extent.chunk) + extent.start + (start - extent.row) * pitch
                    found.append((at + start - first, Stretch(extent.chunk.file, byte, held * pitch)))
        found.sort(key=lambda item: item[0])
        if sum(stretch.nbytes for _, stretch in found) != rows * pitch:
            return None
        return deque(stretch for _, stretch in found)

    def carry(self, stretches: deque[Stretch], part: Part, buffers: Buffers) -> int:
        """Write a part from the first of the stretches, which are used up; returns its CRC-32."""
        whole = buffers.take("relayed", 1, min(BLOCK, part.nbytes)).reshape(-1).data
        start, crc = self.sink.data_start(part.extent.chunk) + part.offset, 0
        for at in range(0, part.nbytes, BLOCK):
            block, done = whole[: min(BLOCK, part.nbytes - at)], 0
            while done < len(block):
                first = stretches.popleft()
                count = min(first.nbytes, len(block) - done)
                self.source.read_into(first.file, first.start, block[done : done + count])
                if count < first.nbytes:
                    stretches.appendleft(Stretch(first.file, first.start + count, first.nbytes - count))
                done += count
            crc = crc32(block, crc)
            self.sink.write(part.extent.chunk.file, start + at, block)
        return crc
