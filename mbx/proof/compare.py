"""A sink that compares: what a conversion would write, held against what a checkpoint has, block by block."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from converters.engine.plan import Draft, Plan, Unit
from converters.engine.stream import Engine
from converters.planning.pairing import same_units
from converters.protocols import Source
from converters.tensors import DTYPE_BITS, Chunk, Shape, StoredTensor
from mbx.run.job import DEFAULT_MAX_MEMORY

Progress = Callable[[int], None]
#: Bytes compared at once, so that what a comparison needs beside the engine's buffers stays small.
_BLOCK_BYTES = 1 << 20
#: Where fewer than one value in this many differs, the others are left out of the arithmetic.
_SPARSE = 8
EntryId = tuple[str, Shape]


@dataclass(frozen=True, slots=True)
class Reading:
    """How both sides are read: threads, bytes in flight, and whom to tell of bytes to compare and of those done."""

    workers: int = 2
    max_memory: int = DEFAULT_MAX_MEMORY
    progress: Progress = lambda _: None
    expect: Progress = lambda _: None


#: As a caller reads who says nothing of it.
PLAIN = Reading()


@dataclass(slots=True)
class Tally:
    """What was found in one entry of a tensor.

    `differing` of `compared` values are not bit for bit equal, the first at `first` (in elements of the whole
    tensor). `max_abs` is the largest difference of two values, infinite where one is not finite. `change` and
    `norm` are sums of squares: of the differences, and of the left values where norms were asked for.
    """

    compared: int = 0
    differing: int = 0
    first: Shape | None = None
    max_abs: float = 0.0
    change: float = 0.0
    norm: float = 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    tensor: StoredTensor
    chunk: Chunk


class ComparingSink:
    """Compares what the engine would write with what `source` holds.

    `depths` are the leading dimensions of a tensor that stack entries. Rows from `limits[name]` on are not compared:
    they are padding. With `norms` every value is looked at, not only those that differ.
    """

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, StoredTensor],
        depths: Mapping[str, int],
        limits: Mapping[str, int],
        *,
        norms: bool = False,
    ) -> None:
        self.source, self.depths, self.limits, self.norms = source, depths, limits, norms
        self.compared_bytes = 0
        self.tallies: dict[EntryId, Tally] = {}
        self._places: dict[str, list[_Place]] = {}
        for tensor in tensors.values():
            for chunk in tensor.chunks:
                self._places.setdefault(chunk.file, []).append(_Place(chunk.start, tensor, chunk))
        for places in self._places.values():
            places.sort(key=lambda place: place.start)
        self._lock = threading.Lock()

    def data_start(self, chunk: Chunk) -> int:
        """Where the checkpoint keeps a chunk's data."""
        return self.source.data_start(chunk)

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Compare `data`, which lies in one entry of one chunk, with the stored bytes."""
        places = self._places[file]
        place = places[bisect_right(places, start, key=lambda place: place.start) - 1]
        tensor, chunk = place.tensor, place.chunk
        depth, item = self.depths.get(tensor.name, 0), DTYPE_BITS[tensor.dtype] // 8
        inner = math.prod(chunk.sizes[depth:])
        at = (start - self.source.data_start(chunk)) // item
        lead = np.unravel_index(at // max(1, inner), chunk.sizes[:depth]) if depth else ()
        entry = tuple(int(a) + b for a, b in zip(lead, chunk.offsets[:depth], strict=True))
        nbytes = self._within(tensor, chunk, depth, at % max(1, inner), len(data))
        found = Tally()
        stored = np.empty(min(_BLOCK_BYTES, nbytes), np.uint8)
        for skip in range(0, nbytes, _BLOCK_BYTES):
            part = stored[: min(_BLOCK_BYTES, nbytes - skip)]
            self.source.read_into(file, start + skip, part.data)
            wanted = np.frombuffer(data[skip : skip + len(part)], np.uint8)
            self._compare(found, tensor.dtype, wanted, part, chunk, at + skip // item)
        with self._lock:
            self.compared_bytes += nbytes
            add_tally(self.tallies.setdefault((tensor.name, entry), Tally()), found)

    def _within(self, tensor: StoredTensor, chunk: Chunk, depth: int, at: int, nbytes: int) -> int:
        """Bytes of a write of `nbytes` from element `at` of an entry that lie above the tensor's limit."""
        limit = self.limits.get(tensor.name)
        if limit is None:
            return nbytes
        row = math.prod(chunk.sizes[depth + 1 :])
        last = max(0, limit - chunk.offsets[depth]) * row
        return min(nbytes, max(0, last - at) * DTYPE_BITS[tensor.dtype] // 8)

    def _compare(
        self,
        found: Tally,
        dtype: str,
        wanted: npt.NDArray[np.uint8],
        stored: npt.NDArray[np.uint8],
        chunk: Chunk,
        first: int,
    ) -> None:
        word = np.dtype(f"u{DTYPE_BITS[dtype] // 8}")
        left, right = wanted.view(word), stored.view(word)
        found.compared += len(left)
        if not np.array_equal(left, right):
            unequal = left != right
            count = int(np.count_nonzero(unequal))
            if found.first is None:
                position = np.unravel_index(first + int(unequal.argmax()), chunk.sizes) if chunk.sizes else ()
                found.first = tuple(int(a) + b for a, b in zip(position, chunk.offsets, strict=True))
            found.differing += count
            if count * _SPARSE < len(left):
                left, right, unequal = left[unequal], right[unequal], unequal[unequal]
            _measure(found, dtype, left, right, unequal)
        if self.norms:
            from converters.causes import floats

            values = floats(wanted, dtype)
            found.norm += float(np.dot(values, values))

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Nothing surrounds a compared chunk."""


def _measure(
    found: Tally,
    dtype: str,
    left: npt.NDArray[np.generic],
    right: npt.NDArray[np.generic],
    unequal: npt.NDArray[np.bool_],
) -> None:
    """Size of the differences; equal bits differ by nothing, also where they are NaN."""
    from converters.causes import floats

    with np.errstate(invalid="ignore", over="ignore"):
        delta = floats(right.view(np.uint8), dtype)
        delta -= floats(left.view(np.uint8), dtype)
        delta[~unequal] = 0
        largest = max(float(delta.max()), -float(delta.min()))
        found.change += float(np.dot(delta, delta))
    found.max_abs = max(found.max_abs, largest if math.isfinite(largest) else math.inf)


def add_tally(total: Tally, part: Tally) -> None:
    """Count `part` into `total`."""
    if part.first is not None and (total.first is None or part.first < total.first):
        total.first = part.first
    total.compared += part.compared
    total.differing += part.differing
    total.max_abs = max(total.max_abs, part.max_abs)
    total.change += part.change
    total.norm += part.norm


def compare(
    plan: Plan,
    targets: Mapping[str, StoredTensor],
    left: Source,
    right: Source,
    *,
    limits: Mapping[str, int],
    reading: Reading,
    norms: bool = False,
) -> ComparingSink:
    """Run the plan for the tensors of `targets` into a comparison; returns the sink with its tallies."""
    narrowed = narrow(plan, targets)
    depths = {entry.tensor: len(entry.index) for unit in narrowed.units for entry in unit.entries}
    sink = ComparingSink(right, targets, depths, limits, norms=norms)
    # A sixteenth for the stored blocks of every worker, which the engine knows nothing of.
    max_memory = reading.max_memory * 15 // 16
    reading.expect(narrowed.target_bytes)
    Engine(narrowed, targets, left, sink, workers=reading.workers, max_memory=max_memory).run(reading.progress)
    return sink


def repeats(plan: Plan, mine: StoredTensor, other: StoredTensor, source: Source) -> bool:
    """Whether `mine` holds the values of `other`, both read from `source`; `plan` is one that knows of them."""
    if (mine.shape, mine.dtype) != (other.shape, other.dtype):
        return False
    alone = replace(plan, units=tuple(same_units(mine, other, 0)), sources={mine.name: mine}, encoded={})
    sink = compare(alone, {other.name: other}, source, source, limits={}, reading=Reading(1, 1 << 26))
    return not any(tally.differing for tally in sink.tallies.values())


def narrow(plan: Plan, targets: Mapping[str, StoredTensor]) -> Plan:
    """The part of a plan that makes all of `targets` and nothing else, in the dtypes that they have."""

    def is_there(name: str) -> bool:
        whole = plan.reencoded.get(name)
        return name in targets if whole is None else all(part.name in targets for part in whole.parts.values())

    def kept(unit: Unit) -> Unit:
        entries = tuple(entry for entry in unit.entries if is_there(entry.tensor))
        names = {entry.tensor for entry in entries}
        return replace(unit, entries=entries, moves=tuple(m for m in unit.moves if m.target.tensor in names))

    units = tuple(unit for unit in map(kept, plan.units) if unit.entries)
    drafts = tuple(Draft(t.name, t.dtype, t.shape, ()) for t in targets.values())
    return replace(plan, drafts=drafts, units=units)
