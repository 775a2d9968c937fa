"""Fill a built model from storage: each rank reads the rows it holds, straight into its parameters.

A plan of the conversion engine says where every row of every Megatron Core tensor comes from. Here the targets are
not files but this rank's shards, as the model's own `sharded_state_dict` places them in the global tensors, so no
intermediate checkpoint is written and no rank ever holds the whole model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch

from converters.engine.pieces import Piece
from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.regions import Move, Region
from converters.engine.stream import Engine
from converters.errors import CoverageError, StorageError
from converters.planning.importer import plan_import
from converters.rows.coverage import Ledger
from converters.rows.pack import Slot
from converters.tensors import Chunk, Shape, StoredTensor, nbytes_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.files import FileSource
from mbx.formats.registry import open_checkpoint
from mbx.proof.compare import repeats
from mbx.run.job import DEFAULT_MAX_MEMORY
from mbx.tables import table_for
from mbx.train.model.blueprint import Blueprint

if TYPE_CHECKING:
    from torch import nn

_DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


class _Shard(Protocol):
    """The fields of Megatron Core's ShardedTensor that say where a shard lies."""

    key: str
    data: torch.Tensor
    global_shape: Shape
    global_offset: Shape
    prepend_axis_num: int


def load_weights(model: nn.Module, plan: Blueprint, path: Path) -> str:
    """Fill `model` (a bare GPTModel) from a Hugging Face folder or a torch_dist checkpoint; returns a line to log.

    Raises CoverageError where the model has parameters the storage does not, StorageError where it cannot be read.
    """
    began = time.perf_counter()
    shards = list(model_shards(model))
    opened = open_checkpoint(path)
    full = _import(plan, opened) if opened.spelling == "hf" else _same_keys(plan, opened.tensors, shards)
    source = opened.source
    try:
        counted = CountingSource(source)
        _check_tied(full, source)
        _fill(full, shards, counted)
    finally:
        source.close()
    _check_filled(model, shards)
    took = time.perf_counter() - began
    return f"read {counted.bytes_read / 1e6:.1f} MB of {full.source_bytes / 1e6:.1f} MB from {path} in {took:.1f} s"


def check_source(plan: Blueprint, path: Path) -> None:
    """What `load_weights` can say of a storage before there is a model: that it opens and, by its table, is whole."""
    opened = open_checkpoint(path)
    if opened.spelling == "hf":
        _import(plan, opened)


def _import(plan: Blueprint, folder: Checkpoint) -> Plan:
    return plan_import(plan.table or table_for(folder.config), folder.config, folder.tensors, plan.layout)


def model_shards(model: nn.Module) -> Iterator[_Shard]:
    """This rank's shards, each a view into a parameter's memory, adapters not included."""
    from mbx.models.megatron.core.sharding import ShardedTensor, ShardedTensorFactory
    from mbx.models.megatron.weights import sharded_weights

    def walk(value: object) -> Iterator[_Shard]:
        if isinstance(value, ShardedTensorFactory):
            yield from walk(value.build())
        elif isinstance(value, ShardedTensor):
            if not value.key.rpartition(".")[2].startswith("lora_"):
                yield cast(_Shard, value)
        elif isinstance(value, Mapping):
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from walk(inner)

    yield from walk(sharded_weights(model))


def _same_keys(plan: Blueprint, tensors: Mapping[str, StoredTensor], shards: list[_Shard]) -> Plan:
    """A plan that copies Megatron Core tensors under their own keys; rows of padding beyond the source stay zero."""
    units, seen = [], set()
    for shard in shards:
        index = tuple(shard.global_offset[: shard.prepend_axis_num])
        stored = tensors.get(shard.key)
        if stored is None or (shard.key, index) in seen:
            continue
        seen.add((shard.key, index))
        rest, wanted = stored.shape[len(index) :], tuple(shard.global_shape[len(index) :])
        padded = shard.key.startswith(("embedding.word_embeddings", "output_layer"))
        if rest != wanted and not (padded and rest[1:] == wanted[1:]):
            raise CoverageError(
                f"`{shard.key}` has shape {list(rest)} in the checkpoint; the model has {list(wanted)}"
            )
        rows = min(rest[0], wanted[0]) if rest else 1
        slot = Slot.whole(rows)
        move = Move(Region(shard.key, index, slot), Region(shard.key, index, slot))
        units.append(Unit(shard.key, (move,), (Entry(shard.key, index),)))
    return Plan("mcore", plan.table, plan.config, plan.layout, tensors, (), tuple(units), Ledger(0, 0))


def _fill(full: Plan, shards: list[_Shard], source: CountingSource) -> None:
    """Run the part of a plan that reaches this rank's shards."""
    known = {entry.tensor for unit in full.units for entry in unit.entries}
    if missing := sorted({shard.key for shard in shards} - known):
        raise CoverageError(
            f"the storage has no values for {len(missing)} of the model's tensors: {missing[0]}",
            hint="the mapping table and the built model disagree; `mbx models check` tests the table",
            details=missing,
        )
    shapes = {draft.name: draft.shape for draft in full.drafts}
    for shard in shards:
        if (stored := shapes.get(shard.key)) is not None and tuple(stored) != tuple(shard.global_shape):
            raise CoverageError(
                f"`{shard.key}` has shape {list(stored)} in the storage; the model has {list(shard.global_shape)}",
                hint="model.config cannot change the sizes of weights that are read",
            )
    by_key: dict[str, list[_Shard]] = {}
    for shard in shards:
        by_key.setdefault(shard.key, []).append(shard)
    targets, memory = {}, {}
    for key, mine in by_key.items():
        chunks = []
        for number, shard in enumerate(mine):
            file = f"{key}#{number}"
            stack = (1,) * shard.prepend_axis_num
            memory[file] = shard.data
            chunks.append(Chunk(tuple(shard.global_offset), (*stack, *shard.data.shape), file, 0))
        dtype = _DTYPES[str(mine[0].data.dtype)]
        targets[key] = StoredTensor(key, dtype, tuple(mine[0].global_shape), tuple(chunks))
    units = []
    for unit in full.units:
        entries = tuple(e for e in unit.entries if e.tensor in targets and _reached(targets[e.tensor], e))
        if entries:
            units.append(replace(unit, entries=entries))
    drafts = tuple(Draft(t.name, t.dtype, t.shape, ()) for t in targets.values())
    narrowed = replace(full, drafts=drafts, units=tuple(units))
    workers = min(4, os.cpu_count() or 1)
    engine = Engine(narrowed, targets, source, MemorySink(memory), workers=workers, max_memory=DEFAULT_MAX_MEMORY)
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

    def __init__(self, shards: Mapping[str, torch.Tensor]) -> None:
        self._bytes: dict[str, torch.Tensor] = {}
        for name, tensor in shards.items():
            if not tensor.is_contiguous():
                raise StorageError(f"`{name}` is a shard with gaps in memory, which cannot be filled in place")
            self._bytes[name] = tensor.detach().reshape(-1).view(torch.uint8)

    def data_start(self, chunk: Chunk) -> int:
        """A shard's memory starts at its first byte."""
        return 0

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Copy bytes into a shard, on whichever device it lives."""
        self._bytes[file][start : start + len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Nothing surrounds a parameter."""


def _check_filled(model: nn.Module, shards: list[_Shard]) -> None:
    """Every parameter's memory is covered by shards: what `sharded_state_dict` leaves out would stay random."""
    filled: dict[int, int] = {}
    for shard in shards:
        storage = shard.data.untyped_storage().data_ptr()
        filled[storage] = filled.get(storage, 0) + nbytes_of(_DTYPES[str(shard.data.dtype)], tuple(shard.data.shape))
    short = [
        name
        for name, p in model.named_parameters()
        if ".lora_" not in name and filled.get(p.untyped_storage().data_ptr(), 0) < p.numel() * p.element_size()
    ]
    if short:
        raise CoverageError(f"{len(short)} parameter(s) were not filled: {short[0]}", details=short)
