"""Fill a built model: from storage, each rank the rows that it holds, or from tensors that somebody hands over.

A plan of the conversion engine says where every row of every Megatron Core tensor comes from. Here the targets are
not files but this rank's shards, as the model's own `sharded_state_dict` places them in the global tensors, so no
intermediate checkpoint is written and no rank ever holds the whole model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from converters.engine.boxes import Box
from converters.engine.pieces import Piece
from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.regions import Move, Region
from converters.engine.stream import Engine
from converters.errors import CoverageError, StorageError
from converters.mcore.cuts import is_vocab
from converters.mcore.layout import Layout
from converters.planning.hybrid import as_hybrid
from converters.planning.importer import plan_import
from converters.rows.coverage import Ledger
from converters.rows.expr import Value
from converters.rows.pack import Slot
from converters.rows.table import Table
from converters.tensors import Chunk, StoredTensor
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.files import FileSource
from mbx.installed import core_release
from mbx.live.exchange import World
from mbx.live.held import Held
from mbx.live.routing import TensorSpec
from mbx.live.sending import in_shape
from mbx.live.shards import Model, Shard, Views
from mbx.live.staging import Staging
from mbx.proof.compare import repeats
from mbx.run.job import DEFAULT_MAX_MEMORY
from mbx.tables import table_for


@dataclass(frozen=True, slots=True)
class Read:
    """What a rank read: of the storage's `source_bytes`, in `seconds`."""

    bytes_read: int
    source_bytes: int
    seconds: float


def load_checkpoint(
    chunks: Sequence[nn.Module],
    opened: Checkpoint,
    config: Mapping[str, Value],
    table: Table | None,
    layout: Layout,
) -> Read:
    """Fill the chunks of a model, adapters aside, from a Hugging Face folder or a Megatron checkpoint.

    `layout` says how far a vocabulary is padded, with zeros; `table` and `config` are those of a Megatron checkpoint's
    model, a folder has its own config. No rank waits for another. Raises CoverageError where the model has parameters
    that the storage has not, StorageError where it cannot be read.
    """
    began = time.perf_counter()
    model = Model(chunks)
    if opened.spelling == "hf":
        full = plan_folder(opened, table, layout)
        if _is_hybrid(model) and full.config.get("model.mcore_model", "gpt") == "gpt":
            full = as_hybrid(full)
    else:
        full = _same_keys(config, table, opened, model)
    source = opened.source
    try:
        counted = CountingSource(source)
        _check_tied(full, source)
        _fill(full, model.base, model.views(), counted)
    finally:
        source.close()
    return Read(counted.bytes_read, full.source_bytes, time.perf_counter() - began)


def plan_folder(folder: Checkpoint, table: Table | None, layout: Layout) -> Plan:
    """The import of a Hugging Face folder; raises what is wrong with it before there is a model."""
    return plan_import(table or table_for(folder.config), folder.config, folder.tensors, layout)


def _is_hybrid(model: Model) -> bool:
    """Whether this is a HybridModel, whose layers are attention or MLP alone."""
    return any(hasattr(chunk, core_release().hybrid_pattern) for chunk in model.chunks())


def _same_keys(config: Mapping[str, Value], table: Table | None, opened: Checkpoint, model: Model) -> Plan:
    """A plan that copies Megatron Core tensors under their own keys; rows of padding beyond the source stay zero."""
    units, seen = [], set()
    for shard in model.base:
        index = shard.offsets[: shard.stacked]
        stored = opened.tensors.get(shard.key)
        if stored is None or (shard.key, index) in seen:
            continue
        seen.add((shard.key, index))
        rest, wanted = stored.shape[len(index) :], shard.shape[len(index) :]
        if rest != wanted and not (is_vocab(shard.key) and rest[1:] == wanted[1:]):
            raise CoverageError(
                f"`{shard.key}` has shape {list(rest)} in the checkpoint; the model has {list(wanted)}"
            )
        rows = min(rest[0], wanted[0]) if rest else 1
        slot = Slot.whole(rows)
        move = Move(Region(shard.key, index, slot), Region(shard.key, index, slot))
        units.append(Unit(shard.key, (move,), (Entry(shard.key, index),)))
    return Plan("mcore", table, config, Layout(), opened.tensors, (), tuple(units), Ledger(0, 0))


def _fill(full: Plan, shards: Sequence[Shard], views: Views, source: CountingSource) -> None:
    """Run the part of a plan that reaches this rank's shards."""
    known = {entry.tensor for unit in full.units for entry in unit.entries}
    if missing := sorted({shard.key for shard in shards} - known):
        raise CoverageError(
            f"the storage has no values for {len(missing)} of the model's tensors: {missing[0]}",
            hint="the mapping table and the built model disagree; `mbx models check` tests the table",
            details=missing,
        )
    staging = Staging(views, shards)
    shapes = {draft.name: draft.shape for draft in full.drafts}
    for shard in shards:
        if (stored := shapes.get(shard.key)) is not None and tuple(stored) != shard.shape:
            raise CoverageError(
                f"`{shard.key}` has shape {list(stored)} in the storage; the model has {list(shard.shape)}",
                hint="model.config cannot change the sizes of weights that are read",
            )
    by_key: dict[str, list[Shard]] = {}
    for shard in shards:
        by_key.setdefault(shard.key, []).append(shard)
    targets, files = {}, {}
    for key, mine in by_key.items():
        chunks = []
        for number, shard in enumerate(mine):
            file = f"{key}#{number}"
            files[file] = shard
            chunks.append(Chunk(shard.offsets, shard.sizes, file, 0))
        targets[key] = StoredTensor(key, mine[0].dtype, mine[0].shape, tuple(chunks))
    units = []
    for unit in full.units:
        entries = tuple(e for e in unit.entries if e.tensor in targets and _reached(targets[e.tensor], e))
        if entries:
            units.append(replace(unit, entries=entries))
    drafts = tuple(Draft(t.name, t.dtype, t.shape, ()) for t in targets.values())
    narrowed = replace(full, drafts=drafts, units=tuple(units))
    workers = min(4, os.cpu_count() or 1)
    sink = MemorySink(staging, files)
    engine = Engine(narrowed, targets, source, sink, workers=workers, max_memory=DEFAULT_MAX_MEMORY)
    engine.work(local_pieces(engine))
    engine.checksums()  # every byte of every shard was written, once


def _reached(target: StoredTensor, entry: Entry) -> bool:
    depth = len(entry.index)
    return any(chunk.offsets[:depth] == entry.index for chunk in target.chunks)


def local_pieces(engine: Engine) -> list[Piece]:
    """The engine's pieces, clipped to the rows that are stored in a chunk: other rows belong to other ranks.

    Rows of a tensor that is cut by columns are read whole, since they lie side by side in the source.
    """
    pieces: list[Piece] = []
    for piece in engine.pieces:
        if piece.entry is None:
            pieces.append(piece)
            continue
        parts = list(engine.geometry.parts(piece))
        if engine.plan.encoded and parts:  # a codec decodes whole blocks; rows beyond the chunk are not written
            pieces.append(piece)
            continue
        for first, count in sorted({(part.row, part.rows) for part in parts}):
            pieces.append(replace(piece, row=first, rows=count))
    return pieces


def _check_tied(full: Plan, source: FileSource) -> None:
    """Tensors that the config declares tied must hold the same bytes: an untied head is never dropped.

    One rank looks; the source is the same for all.
    """
    for name, other in full.equal if torch.distributed.get_rank() == 0 else ():
        if not repeats(full, full.sources[name], full.sources[other], source):
            raise CoverageError(
                f"`{name}` should repeat `{other}`, and does not",
                hint="config.json says they are tied: set `tie_word_embeddings` to false to keep both",
            )


class CountingSource:
    """A source that counts the bytes it gives."""

    def __init__(self, source: FileSource) -> None:
        self.source, self.bytes_read = source, 0

    def data_start(self, chunk: Chunk) -> int:
        """Byte offset of a chunk's data."""
        return self.source.data_start(chunk)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer`."""
        self.source.read_into(file, start, buffer)
        self.bytes_read += len(buffer)


class MemorySink:
    """Writes into parameters: `file` names a shard, whose memory is its data as bytes."""

    def __init__(self, staging: Staging, shards: Mapping[str, Shard]) -> None:
        self._staging, self._shards = staging, shards
        for name, shard in shards.items():
            own = shard.sizes[shard.stacked :]
            if not torch.empty_strided(own, shard.strides, device="meta").is_contiguous():
                raise StorageError(f"`{name}` is a shard with gaps in memory, which cannot be filled in place")

    def data_start(self, chunk: Chunk) -> int:
        """A shard's memory starts at its first byte."""
        return 0

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Copy bytes into a shard, on whichever device it lives."""
        memory = self._staging.memory(self._shards[file]).detach().reshape(-1).view(torch.uint8)
        memory[start : start + len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """A shard has all of its data."""
        self._staging.wrote(self._shards[chunk.file])


class Filler:
    """Fills a model with tensors under Hugging Face's names, in any order; each rank takes what it holds of them.

    `idle` are names that may come and are not wanted. A tensor that shares its memory with another, as a tied head
    does, must repeat it.
    """

    def __init__(
        self,
        views: Views,
        world: World,
        specs: Sequence[TensorSpec],
        boxes: Mapping[str, Sequence[Box]],
        idle: Iterable[str] = (),
    ) -> None:
        self._idle = frozenset(idle)
        self._shards = [shard for shards in world.mine.values() for shard in shards]
        self._shapes = {spec.name: spec.shape for spec in specs}
        self._dtypes = {spec.name: spec.dtype for spec in specs}
        self._parts = {
            spec.name: [(box, s) for box in boxes[spec.name] for s in world.mine.get((box.source, box.chunk), ())]
            for spec in specs
        }
        self._staging = Staging(views, (shard for parts in self._parts.values() for _, shard in parts))
        self._done: set[str] = set()
        self._written: dict[int, str] = {}

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Copy this rank's part of a tensor; CoverageError for one that has no place, or comes twice."""
        if name in self._idle:
            return
        if name not in self._shapes:
            raise CoverageError(f"`{name}` has no place in the model")
        if name in self._done:
            raise CoverageError(f"`{name}` came twice")
        if tuple(tensor.shape) != tuple(self._shapes[name]):
            raise CoverageError(f"`{name}` has shape {list(tensor.shape)}; the model has {list(self._shapes[name])}")
        self._done.add(name)
        with torch.no_grad():
            for box, shard in self._parts[name]:
                view = in_shape(self._staging.memory(shard), box)
                one = Held(name, box.index, view, False, self._dtypes[name], box.shift)
                self._fill(one, tensor[one.index], alone=self._staging.stands_for(shard))
                self._staging.wrote(shard)

    def _fill(self, one: Held, values: torch.Tensor, *, alone: bool) -> None:
        """Write values, or compare them where another name has written there; `alone`: none can have."""
        if alone:
            one.fill(values)
            return
        first = self._written.setdefault(one.view.data_ptr(), one.name)
        if first == one.name:
            one.fill(values)
            return
        before = one.view.clone()
        one.fill(values)
        if not torch.equal(one.view, before):
            raise CoverageError(f"`{one.name}` shares its values with `{first}`, and came with others")

    def finish(self, vocab: int) -> None:
        """Make rows of padding zero, those behind `vocab`; CoverageError where a tensor did not come."""
        if missing := [name for name in self._shapes if name not in self._done]:
            raise CoverageError(f"{len(missing)} tensor(s) did not come, first `{missing[0]}`", details=missing)
        for shard in self._shards:
            if is_vocab(shard.key) and not self._staging.stands_for(shard):  # what stands for codes begins as zeros
                with torch.no_grad():
                    self._staging.memory(shard)[max(0, vocab - shard.offsets[0]) :].zero_()
