"""Exports in the parts of a codec: made before they travel where a rank has whole blocks, behind that where not."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch

from converters.codecs import Fp8Block
from converters.codecs.base import ceil_div
from converters.codecs.decode import Encoded, read_part
from converters.engine.boxes import Box, Index, sizes_of
from converters.engine.plan import Draft
from converters.errors import CoverageError, StorageError, UnsupportedError, UsageError
from converters.tensors import StoredTensor
from converters.torch_casts import TORCH_DTYPES
from mbx.formats import hf
from mbx.formats.files import FileSource
from mbx.live.exchange import ChunkId, World
from mbx.live.moves import assign, contiguous
from mbx.live.planned import Stream, chosen
from mbx.live.routing import TensorSpec, starts_of
from mbx.live.sending import BUCKET, Bucket, Receivers, Sender, To, in_shape
from mbx.live.shards import Model, Shard, Values, Views
from mbx.live.source import Source
from mbx.live.transport import view_of
from mbx.run.export_codec import SAME, Codes, codes_of, quantised_now

#: How tensors leave: as the folder that was attached to stores them, or quantised now.
Codec = Literal["same", "fp8_block"]
CODECS: tuple[Codec, ...] = ("same", "fp8_block")
#: Before the names of parts where keys of Megatron Core stand, none of which begins so.
_MARK = "codes:"


@dataclass(frozen=True, slots=True)
class Cut:
    """Whole blocks of a tensor that the same ranks hold: `index` picks them, `boxes` make them."""

    encoded: Encoded
    index: Index
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class CodedShard(Shard):
    """A part of a cut, which is computed where it is asked for, of shards that this rank holds."""

    cut: Cut
    role: str
    held: tuple[Shard, ...]


class Encoder:
    """Makes parts of values, with the scales of the source under blocks that did not change."""

    def __init__(self, scales: Mapping[str, Mapping[str, StoredTensor]], folder: Path | None) -> None:
        self._stored = {name: parts["scale"] for name, parts in scales.items() if "scale" in parts}
        self._folder, self._read = folder, dict[str, torch.Tensor]()

    def parts(self, encoded: Encoded, values: torch.Tensor, index: Index | None = None) -> dict[str, torch.Tensor]:
        """The parts of a tensor's `values`, or of those that `index` picks; StorageError for what they cannot hold."""
        from converters.codecs.arithmetic.reencode import reencode

        scale = self._scale(encoded, index)
        try:
            made = reencode(encoded.codec, values, None if scale is None else scale.to(values.device))
        except StorageError as error:
            error.details = (*error.details, f"`{encoded.tensor.name}`")
            raise
        return {role: made[role].to(TORCH_DTYPES[part.dtype]).contiguous() for role, part in encoded.parts.items()}

    def _scale(self, encoded: Encoded, index: Index | None) -> torch.Tensor | None:
        name = encoded.tensor.name
        if name not in self._stored or self._folder is None:
            return None
        if name not in self._read:
            source = FileSource(self._folder)
            try:
                self._read[name] = read_part(source, self._stored[name], None)
            finally:
                source.close()
        whole = self._read[name]
        return whole if index is None else whole[_part_index(encoded, "scale", index)]


class CodedViews(Views):
    """A rank's shards, and parts of what they hold; those that were made last are kept, for a scale follows codes."""

    def __init__(self, views: Views, encoder: Encoder) -> None:
        self._views, self._encoder = views, encoder
        self._last: tuple[Cut, dict[str, torch.Tensor]] | None = None

    def taken(self, shard: Shard) -> tuple[torch.Tensor, bool]:
        if not isinstance(shard, CodedShard):
            return self._views.taken(shard)
        if self._last is None or self._last[0] is not shard.cut:
            self._last = None  # before others are made
            self._last = shard.cut, self._encoder.parts(shard.cut.encoded, self._joined(shard), shard.cut.index)
        return self._last[1][shard.role], True

    def _joined(self, shard: CodedShard) -> torch.Tensor:
        """What a cut holds, in the model's dtype: the live memory itself where one box has it."""
        cut = shard.cut
        found = [in_shape(self._views[held], box) for held, box in zip(shard.held, cut.boxes, strict=True)]
        if len(found) == 1:
            return found[0]
        dtype = TORCH_DTYPES[cut.encoded.tensor.dtype]
        out = torch.empty(sizes_of(cut.index), dtype=dtype, device=found[0].device)
        for box, values in zip(cut.boxes, found, strict=True):
            inside = zip(box.index, cut.index, strict=True)
            where = tuple(slice(own.start - all_.start, own.stop - all_.start, own.step) for own, all_ in inside)
            assign(out[where], values)
        return out


class CodedModel:
    """A model whose views have parts of a codec, too."""

    def __init__(self, model: Model, encoder: Encoder) -> None:
        self._model, self._encoder = model, encoder

    def device(self) -> torch.device:
        return self._model.device()

    def views(self, values: Values | None = None) -> Views:
        return CodedViews(self._model.views(values), self._encoder)


class Coding:
    """A stream in the parts of a codec. `specs` are what comes out; `early` the tensors that travel as codes, `late`
    those that are encoded by each rank that receives them, for a block of theirs lies on several."""

    def __init__(self, model: Model, world: World, source: Source, streams: tuple[Stream, Stream], codes: Codes):
        stream, held = streams
        plain, dtypes = {d.name: d for d in held.plan.drafts}, {spec.name: spec.dtype for spec in held.specs}
        self._encode = encode = {
            name: replace(whole, tensor=StoredTensor(name, dtypes[name], plain[name].shape, ()))
            for name, whole in codes.encode.items()
            if name in plain
        }
        self.codes, self._encoder, self._model = codes, Encoder(codes.scales, source.folder), model
        cuts = {name: _cuts(whole, stream.boxes[name], world) for name, whole in encode.items()}
        self.early = tuple(name for name, found in cuts.items() if found)
        self.late = {name: encode[name] for name, found in cuts.items() if not found}
        boxes = {name: own for name, own in stream.boxes.items() if name not in self.early}
        mine: dict[ChunkId, tuple[Shard, ...]] = dict(world.mine)
        holders = dict(world.holders)
        for found in cuts.values():
            for number, cut in enumerate(found):
                for box, shard, having in _placed(cut, number, world):
                    boxes[box.tensor] = (*boxes.get(box.tensor, ()), box)
                    place = box.source, box.chunk
                    holders[place] = having
                    if shard is not None:
                        mine[place] = (shard,)
        self._boxes: Mapping[str, tuple[Box, ...]] = boxes
        self._out: dict[str, tuple[TensorSpec, ...]] = {}  # by what travels
        for spec in stream.specs:
            parts = tuple(_specs(spec, encode[spec.name])) if spec.name in encode else (spec,)
            if spec.name in self.late:
                self._out[spec.name] = parts
            else:
                self._out.update({part.name: (part,) for part in parts})
        whole = {spec.name: replace(spec, dtype=dtypes[spec.name]) for spec in stream.specs if spec.name in self.late}
        self._sent = tuple(whole.get(name, parts[0]) for name, parts in self._out.items())
        self.specs = tuple(part for parts in self._out.values() for part in parts)
        self._sender = Sender(CodedModel(model, self._encoder), replace(world, mine=mine, holders=holders))

    def drafts(self, draft: Draft) -> Iterator[Draft]:
        """What a folder stores of a tensor: its parts, or itself."""
        if (whole := self._encode.get(draft.name)) is None:
            yield draft
        else:
            yield from (Draft.whole(part.name, part.dtype, part.shape) for part in whole.parts.values())

    def buckets(self, bucket: int, to: To, values: Values | None, only: object) -> Iterator[Bucket]:
        """What comes out, a bucket at a time; see `Live.buckets`. Collective."""
        receivers = self._sender.receivers(self._boxes, to)
        yield from self._carried(receivers, bucket, values, only, (to, bucket) if only is None else None)

    def each_at_one(
        self, bucket: int = BUCKET, values: Values | None = None, only: object = None
    ) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """What comes out, every tensor whole, on one rank each; this rank's. Collective."""
        receivers = self._sender.one_each(self._boxes, self._sent)
        for got in self._carried(receivers, bucket, values, only, None):
            yield from got.held()

    def _carried(
        self, receivers: Receivers, bucket: int, values: Values | None, only: object, key: Hashable
    ) -> Iterator[Bucket]:
        wanted = {spec.name for spec in chosen(self.specs, only)}
        sent = [spec for spec in self._sent if wanted.intersection(part.name for part in self._out[spec.name])]
        # A bucket that is encoded behind the gather is there twice, beside one that is still in use.
        size = bucket * 9 // 10 if self.late and bucket > 1 else bucket
        for one in self._sender.buckets(self._boxes, sent, receivers, size, values, key):
            yield self._finished(one, wanted)

    def _finished(self, got: Bucket, wanted: set[str]) -> Bucket:
        """A bucket whose last tensors are encoded."""
        if not any(spec.name in self.late for spec, _ in got.tensors):
            return got
        made = [(part, at) for spec, at in got.tensors for part in self._out[spec.name] if part.name in wanted]
        starts, nbytes = starts_of([part for part, at in made if at is not None])
        data = torch.empty(nbytes, dtype=torch.uint8, device=self._model.device()) if starts else None
        for spec, at in got.tensors:
            if data is None or got.data is None or at is None:
                continue
            values = view_of(got.data, spec, at)
            parts = {spec.name: values}
            if (whole := self.late.get(spec.name)) is not None:
                named = self._encoder.parts(whole, values)
                parts = {part.name: named[role] for role, part in whole.parts.items()}
            for part in self._out[spec.name]:
                if part.name in starts:
                    view_of(data, part, starts[part.name]).copy_(parts[part.name])
        return Bucket(tuple((part, starts.get(part.name)) for part, _ in made), data)


def coding_of(
    codec: str, model: Model, world: World, source: Source, streams: tuple[Stream, Stream], left_out: Sequence[str]
) -> Coding:
    """The coding of a stream, given as it is spelt and in the model's own dtypes.

    UsageError for a codec that is not known, for `same` of a model that was not quantised or without its folder, and
    where no tensor takes it; UnsupportedError where `same` asks for another codec than FP8 by blocks, or for
    activation scales; CoverageError for codes of the folder that the stream has no values for.
    """
    if codec not in CODECS:
        raise UsageError(f"‹codec› {codec!r} is not known", hint=f"choices: {', '.join(CODECS)}")
    folder = source.folder or Path()
    reference = source.folder if source.folder is not None and source.recorded is not None else None
    files = None if reference is None else hf.recorded_layout(reference)
    codes = codes_of(codec, source.config, files, folder, reference)
    if codec != SAME:
        codes = quantised_now(codec, codes, streams[0].plan, ())
    for name, whole in codes.encode.items():
        if not isinstance(whole.codec, Fp8Block):
            raise UnsupportedError(
                f"‹codec› {codec}: `{name}` is stored by {whole.codec.name}, which live models do not write",
                hint="export it plainly, and quantise on the receiver",
            )
    if codes.beside:
        raise UnsupportedError(
            f"‹codec› {codec}: the folder has activation scales, first `{next(iter(codes.beside))}`, which no live "
            "model has",
            hint="take those from the folder, and export plainly",
        )
    shapes = {spec.name: spec.shape for spec in streams[0].specs}
    for name, whole in codes.encode.items():
        if name not in left_out and shapes.get(name) != whole.tensor.shape:
            now = f"is {list(shapes[name])} now" if name in shapes else "is no tensor of this stream"
            raise CoverageError(
                f"‹codec› {codec}: `{name}` {now}; the codes stand for {list(whole.tensor.shape)}",
                hint="‹experts› folder spells them as the folder does",
            )
        if any(box.shift for box in streams[0].boxes.get(name, ())):
            raise CoverageError(f"`{name}` is stored by a codec, and its values are shifted: nothing encodes that")
    return Coding(model, world, source, streams, codes)


def _specs(spec: TensorSpec, encoded: Encoded) -> Iterator[TensorSpec]:
    """The parts of a tensor, which engines take in one call."""
    for part in encoded.parts.values():
        yield TensorSpec(part.name, part.dtype, part.shape, spec.group or spec.name)


def _cuts(encoded: Encoded, boxes: Sequence[Box], world: World) -> tuple[Cut, ...]:
    """The cuts that make a tensor, one for each set of ranks; none where some block lies on several."""
    groups: dict[frozenset[int], list[Box]] = {}
    for box in boxes:
        groups.setdefault(frozenset(world.holders[box.source, box.chunk]), []).append(box)
    out = []
    for group in groups.values():
        index = _around(group)
        if prod(sizes_of(index)) != sum(prod(box.shape) for box in group) or not _in_blocks(encoded, index):
            return ()
        out.append(Cut(encoded, index, tuple(group)))
    return tuple(out)


def _around(boxes: Sequence[Box]) -> Index:
    """The least box, in steps of one, around boxes, which is theirs alone where it has no more elements."""
    every = zip(*([range(part.start, part.stop, part.step) for part in box.index] for box in boxes), strict=True)
    return tuple(slice(min(own[0] for own in dim), max(own[-1] for own in dim) + 1, 1) for dim in every)


def _in_blocks(encoded: Encoded, index: Index) -> bool:
    assert isinstance(encoded.codec, Fp8Block)
    matrix = zip(index[-2:], encoded.tensor.shape[-2:], encoded.codec.block, strict=True)
    return all(not part.start % block and (part.stop == size or not part.stop % block) for part, size, block in matrix)


def _part_index(encoded: Encoded, role: str, index: Index) -> Index:
    """Where a cut's part lies in the whole tensor's."""
    assert isinstance(encoded.codec, Fp8Block)
    if role == "weight":
        return index
    grid = zip(index[-2:], encoded.codec.block, strict=True)
    return (*index[:-2], *(slice(part.start // block, ceil_div(part.stop, block), 1) for part, block in grid))


def _placed(cut: Cut, number: int, world: World) -> Iterator[tuple[Box, CodedShard | None, tuple[int, ...]]]:
    """The box of each part of a cut, the shard that gives it on this rank, and the ranks that can."""
    places = [(box.source, box.chunk) for box in cut.boxes]
    having = world.holders[places[0]]
    for role, part in cut.encoded.parts.items():
        index, key = _part_index(cut.encoded, role, cut.index), _MARK + part.name
        sizes = sizes_of(index)
        shard = None
        if world.rank in having:
            held, offsets = tuple(world.mine[place][0] for place in places), tuple(one.start for one in index)
            own = (key, part.dtype, part.shape, offsets, sizes, 0, world.rank == having[0])
            shard = CodedShard(*own, held[0].chunk, part.name, contiguous(sizes), 0, cut, role, held)
        yield Box(part.name, index, key, number, tuple(slice(0, size, 1) for size in sizes)), shard, having
