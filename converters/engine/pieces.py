"""Cuts a plan into pieces: parts of a run that fit in memory, stand alone and are the same in every process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from converters.codecs.encode import spans
from converters.engine.plan import Entry, Plan, Unit
from converters.engine.regions import Extent, Extents, Move, Region, TensorGrid, matrix
from converters.engine.selected import CHOICE_SCRATCH
from converters.errors import DeviceError
from converters.tensors import DTYPE_BITS, StoredTensor

MIB = 1 << 20
#: 1, 2 and 4 MiB copy at one speed, 8 MiB measured slower: the piece leaves the processor's caches between the calls.
_LARGEST_PIECE = 4 * MIB
_SMALLEST_PIECE = MIB // 4
#: Buffers of a piece's size that a worker keeps: gathered rows, a column strip, cast rows, rows packed for the target.
BUFFERS = 4
#: Below this many bytes a run, reading runs one by one costs more than reading around them.
_FINE_RUN = 64 * 1024
#: What a codec uses beside its input and output: blocks of 256 Ki elements in fp32, a few at a time.
DECODE_SCRATCH = 8 * MIB
#: What a cast uses beside its input and output: blocks of 128 Ki elements, a few at a time.
_CAST_SCRATCH = 2 * MIB
#: What encoding holds beside its input, in units of it: the codes twice, decoded values, and where these differ.
ENCODED_COPIES = 4


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a plan is cut: target `piece_bytes`, and the most memory a unit may take that is loaded whole.

    Two runs that share it, and the plan, have the same pieces under the same numbers.
    """

    piece_bytes: int
    whole_bytes: int

    @classmethod
    def for_memory(cls, max_memory: int, workers: int) -> Cutting:
        """The cutting for `max_memory` bytes shared by `workers`: a quarter for their buffers."""
        piece = max(_SMALLEST_PIECE, min(_LARGEST_PIECE, max_memory // (4 * BUFFERS * max(1, workers))))
        return cls(piece, max(piece, max_memory - BUFFERS * piece * max(1, workers)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[row, row + rows)` of one target entry, or, with `entry` None, a whole unit at once.

    `nbytes` are written, the first into `file`; `memory_bytes` are needed beside a worker's buffers.
    """

    number: int
    unit: Unit
    entry: Entry | None
    row: int
    rows: int
    nbytes: int
    memory_bytes: int
    file: str


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `[row, row + rows)` of a target entry as one chunk stores them: `nbytes` at `offset` of its data.

    `tensor` is the stored one: that of the entry, or where a codec encodes it one of its parts.
    """

    tensor: str
    extent: Extent
    row: int
    rows: int
    offset: int
    nbytes: int


class Geometry:
    """Where the rows of a plan's sources and targets are stored."""

    def __init__(self, plan: Plan, targets: Mapping[str, StoredTensor]) -> None:
        self.plan, self.targets = plan, targets
        self._logical = {name: whole.tensor for name, whole in plan.reencoded.items()}
        self._grids: dict[tuple[bool, str, int], TensorGrid] = {}
        self._extents = lru_cache(maxsize=4096)(self._find)

    def source_extents(self, region: Region) -> Extents:
        """Stored parts of a source region's matrix."""
        return self._extents(False, region.tensor, region.index, region.fold)

    def target_extents(self, entry: Entry) -> Extents:
        """Stored parts of a target entry's matrix."""
        return self._extents(True, entry.tensor, entry.index, entry.fold)

    def _find(self, target: bool, name: str, index: tuple[int, ...], fold: int) -> Extents:
        key = (target, name, len(index))
        grid = self._grids.get(key)
        if grid is None:
            grid = self._grids[key] = TensorGrid((self.targets if target else self.plan.sources)[name], len(index))
        return grid.extents(index, fold)

    def parts(self, piece: Piece) -> Iterator[Part]:
        """Everything a piece writes, in the order it is written."""
        if piece.entry is not None:
            yield from self.entry_parts(piece.entry, piece.row, piece.rows)
            return
        for entry in piece.unit.entries:
            yield from self.entry_parts(entry, 0, self.entry_matrix(entry)[0])

    def entry_parts(self, entry: Entry, row: int, rows: int) -> Iterator[Part]:
        """What storing rows `[row, row + rows)` of an entry writes."""
        if entry.tensor in self._logical:
            yield from self._encoded_parts(entry, row, rows)
            return
        for extent, first, count in self.target_extents(entry).overlap(row, rows):
            if nbytes := count * extent.pitch:
                offset = extent.start + (first - extent.row) * extent.pitch
                yield Part(entry.tensor, extent, first, count, offset, nbytes)

    def _encoded_parts(self, entry: Entry, row: int, rows: int) -> Iterator[Part]:
        whole, fold = self.plan.reencoded[entry.tensor], entry.fold
        for role, offset, nbytes in spans(whole, entry.index, row // fold, rows // fold):
            stored = self.targets[whole.parts[role].name]
            (chunk,) = stored.chunks
            yield Part(stored.name, Extent(chunk, 0, row, rows, 0, 0, 0, 0), row, rows, offset, nbytes)

    def target(self, entry: Entry) -> StoredTensor:
        """The tensor of a target entry, as it is before a codec encodes it."""
        return self._logical.get(entry.tensor) or self.targets[entry.tensor]

    def entry_matrix(self, entry: Entry) -> tuple[int, int]:
        """Rows and columns of a target entry."""
        return matrix(self.target(entry).shape, len(entry.index), entry.fold)

    def origin(self, unit: Unit, entry: Entry) -> str:
        """Dtype of the values that reach an entry; its own where none do."""
        moves = moves_into(unit, entry)
        return (self.plan.sources[moves[0].source.tensor] if moves else self.target(entry)).dtype


def moves_into(unit: Unit, entry: Entry) -> list[Move]:
    """The unit's moves that fill one entry."""
    return [m for m in unit.moves if m.target.tensor == entry.tensor and m.target.index == entry.index]


def cut(geometry: Geometry, cutting: Cutting) -> list[Piece]:
    """Every piece of the plan, in target order; piece `n` has number `n`.

    Raises DeviceError for a unit that cannot be cut and does not fit.
    """
    pieces: list[Piece] = []
    for unit in geometry.plan.units:
        _Cutter(geometry, cutting, unit).add_to(pieces)
    return pieces


class _Cutter:
    """Cuts one unit."""

    def __init__(self, geometry: Geometry, cutting: Cutting, unit: Unit) -> None:
        self.geometry, self.cutting, self.unit = geometry, cutting, unit
        self.sources = {(m.source.tensor, m.source.index): m.source for m in unit.moves}
        plan = geometry.plan
        self.picked = [plan.selected[name].entries[index] for name, index in self.sources if name in plan.selected]
        #: Entries of stored tensors that are read: what is picked of others, or the sources themselves.
        self.read = [(p.tensor, p.index) for p in self.picked] + [s for s in self.sources if s[0] not in plan.selected]
        self.encoded = [plan.encoded[name] for name, _ in self.read if name in plan.encoded]
        self.reencoded = geometry.plan.reencoded

    def add_to(self, pieces: list[Piece]) -> None:
        unit = self.unit
        transposed = any(move.source.transposed or move.target.transposed for move in unit.moves)
        # A codec decodes an entry of a stack as one: asking for its rows one by one would do it again for each.
        indexed = bool(self.encoded) and any(index for _, index in self.read)
        if transposed or indexed or self._is_fine():
            need = self._whole_bytes()
            if need <= self.cutting.whole_bytes:
                nbytes = sum(self._nbytes(entry, 0, self.geometry.entry_matrix(entry)[0]) for entry in unit.entries)
                pieces.append(Piece(len(pieces), unit, None, 0, 0, nbytes, need, self._file(unit.entries[0], 0)))
                return
            if transposed or indexed:
                why = "transposed" if transposed else "decoded an entry at a time"
                raise self._too_large(f"`{unit.row}` is {why} and needs", need, " at once")
        for entry in unit.entries:
            self._add_rows(pieces, entry)

    def _add_rows(self, pieces: list[Piece], entry: Entry) -> None:
        rows, cols = self.geometry.entry_matrix(entry)
        source, target = self._items(entry)
        # A cast has two buffers at a time in the processor's caches.
        touched = source + target if self._is_cast(entry) else max(source, target)
        step = max(1, self.cutting.piece_bytes // max(1, cols * touched))
        align = max((e.codec.row_alignment(e.tensor.shape) for e in self.encoded), default=1) * entry.fold
        if (whole := self.reencoded.get(entry.tensor)) is not None:
            own = whole.codec.encode_alignment(whole.tensor.shape) * entry.fold
            align = rows if entry.index else max(align, own)
        step = max(align, step // align * align)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            need = self._row_memory(count, cols, source, target, entry)
            if whole is not None and need > self.cutting.whole_bytes:
                raise self._too_large(f"`{entry.tensor}` is encoded {count} rows at once, which needs", need)
            nbytes = self._nbytes(entry, row, count)
            pieces.append(Piece(len(pieces), self.unit, entry, row, count, nbytes, need, self._file(entry, row)))

    def _too_large(self, what: str, need: int, how: str = "") -> DeviceError:
        return DeviceError(
            f"{what} {-(-need // MIB)} MiB{how}; {self.cutting.whole_bytes // MIB} MiB are there",
            hint=f"raise ‹max-memory› to {-(-need * 4 // 3 // MIB)}MiB",
        )

    def _row_memory(self, count: int, cols: int, source: int, target: int, entry: Entry) -> int:
        """Bytes that a piece of `count` rows allocates: its buffers only where the kept ones are too small."""
        gathered, stored = count * cols * source, count * cols * target
        need = sum(2 * nbytes for nbytes in (gathered, stored) if nbytes > self.cutting.piece_bytes)
        if self.encoded:
            need += 2 * gathered + DECODE_SCRATCH
        if entry.tensor in self.reencoded:
            need += ENCODED_COPIES * gathered + DECODE_SCRATCH
        if self._is_cast(entry):
            need += _CAST_SCRATCH
        if self.picked:
            need += gathered + CHOICE_SCRATCH
        return need + self._update_bytes(entry, count, cols)

    def _update_bytes(self, entry: Entry, rows: int, cols: int) -> int:
        update = self.geometry.plan.updates.get((entry.tensor, entry.index))
        return 0 if update is None else update.scratch_bytes(rows, cols)

    def _whole_bytes(self) -> int:
        """Peak of loading every source matrix of the unit, then making one entry after another."""
        plan = self.geometry.plan
        loaded = 0
        for region in self.sources.values():
            tensor = plan.sources[region.tensor]
            rows, cols = matrix(tensor.shape, len(region.index), region.fold)
            loaded += rows * cols * _item(tensor)
        made = 0
        for entry in self.unit.entries:
            rows, cols = self.geometry.entry_matrix(entry)
            source, target = self._items(entry)
            # Assembled rows, a gathered or transposed copy of them, row numbers; then the cast and repacked ones.
            stored = target * (self._is_cast(entry) + self._is_cut(entry, cols))
            need = rows * (cols * (2 * source + stored) + 40) + _CAST_SCRATCH
            if entry.tensor in self.reencoded:
                need += ENCODED_COPIES * rows * cols * source + DECODE_SCRATCH
            made = max(made, need + self._update_bytes(entry, rows, cols))
        decoding = loaded + DECODE_SCRATCH if self.encoded else 0
        return loaded + max(made, decoding, self._picking_bytes())

    def _picking_bytes(self) -> int:
        """Beside what is loaded: the rows of a choice, and a strip of its tensor, or all that a codec stores."""
        need = 0
        for picked in self.picked:
            tensor = self.geometry.plan.sources[picked.tensor]
            rows, cols = matrix(tensor.shape, len(picked.index))
            need = max(need, rows * cols * _item(tensor) * (3 if self.encoded else 1) + CHOICE_SCRATCH)
        return need

    def _is_fine(self) -> bool:
        """Whether reading run by run would mean many small reads."""
        for move in self.unit.moves:
            runs = move.runs()
            tensor = self.geometry.plan.sources[move.source.tensor]
            cols = matrix(tensor.shape, len(move.source.index), move.source.fold)[1]
            if len(runs) > 1 and runs.shortest * cols * _item(tensor) < _FINE_RUN:
                return True
        return False

    def _is_cast(self, entry: Entry) -> bool:
        return bool(self.unit.shift) or self.geometry.origin(self.unit, entry) != self.geometry.target(entry).dtype

    def _is_cut(self, entry: Entry, cols: int) -> bool:
        """Whether chunks hold columns of the entry, so that its rows are repacked for them."""
        if entry.tensor in self.reencoded:
            return False
        return any(extent.cols != cols for extent in self.geometry.target_extents(entry).items)

    def _items(self, entry: Entry) -> tuple[int, int]:
        """Bytes of one element where an entry comes from, and where it goes."""
        return DTYPE_BITS[self.geometry.origin(self.unit, entry)] // 8, _item(self.geometry.target(entry))

    def _nbytes(self, entry: Entry, row: int, rows: int) -> int:
        if entry.tensor in self.reencoded:
            return sum(part.nbytes for part in self.geometry.entry_parts(entry, row, rows))
        return rows * self.geometry.entry_matrix(entry)[1] * _item(self.geometry.target(entry))

    def _file(self, entry: Entry, row: int) -> str:
        if (whole := self.reencoded.get(entry.tensor)) is not None:
            return self.geometry.targets[next(iter(whole.parts.values())).name].chunks[0].file
        found = next(self.geometry.target_extents(entry).overlap(row, 1), None)
        return "" if found is None else found[0].chunk.file


def _item(tensor: StoredTensor) -> int:
    return DTYPE_BITS[tensor.dtype] // 8
