"""Exports in the parts of a codec: made before they travel where a rank has whole blocks, behind that where not."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from converters.codecs.decode import Encoded
from converters.engine.boxes import Box
from converters.engine.plan import Draft, Plan
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.live.cuts import cuts_of, held_of, placed
from mbx.live.encoder import CodedModel, Encoder, Largest, largest_of
from mbx.live.exchange import ChunkId, World
from mbx.live.planned import Stream, chosen
from mbx.live.routing import TensorSpec, starts_of
from mbx.live.sending import BUCKET, Bucket, Receivers, Sender, To
from mbx.live.shards import Model, Shard, Values
from mbx.live.source import Source
from mbx.live.transport import view_of
from mbx.run.export_codec import SAME, Codes, codes_of, quantised_now

#: How tensors leave: as the folder that was attached to stores them, or quantised now.
Codec = Literal[
    "same", "fp8_block", "fp8_channel", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4", "int4_group", "int8_channel"
]
CODECS: tuple[Codec, ...] = get_args(Codec)


class Coding:
    """A stream in the parts of a codec. `specs` are what comes out; `early` the tensors that travel as codes, `late`
    those that are encoded by each rank that receives them, for a block of theirs lies on several. Of the early ones,
    `shared` have a scale that what several ranks hold decides."""

    def __init__(self, model: Model, world: World, source: Source, streams: tuple[Stream, Stream], codes: Codes):
        stream, held = streams
        plain, dtypes = {d.name: d for d in held.plan.drafts}, {spec.name: spec.dtype for spec in held.specs}
        self._encode = encode = {
            name: replace(whole, tensor=StoredTensor(name, dtypes[name], plain[name].shape, ()))
            for name, whole in codes.encode.items()
            if name in plain
        }
        self.codes, self._encoder, self._model = codes, Encoder(codes.scales, source.folder), model
        cut = {n: cuts_of(whole, stream.boxes[n], world, codes.scales.get(n, ())) for n, whole in encode.items()}
        self._world, self._cuts = world, {name: found for name, (found, _) in cut.items()}
        self.early = tuple(name for name, found in self._cuts.items() if found)
        self.late = {name: encode[name] for name, found in self._cuts.items() if not found}
        self.shared = tuple(name for name, (_, shared) in cut.items() if shared)
        self._held = {
            name: [
                (box, world.mine[at][0]) for box in stream.boxes[name] if (at := (box.source, box.chunk)) in world.mine
            ]
            for name in encode
        }
        boxes = {name: own for name, own in stream.boxes.items() if not self._cuts.get(name)}
        mine: dict[ChunkId, tuple[Shard, ...]] = dict(world.mine)
        holders = dict(world.holders)
        for found in self._cuts.values():
            for number, one in enumerate(found):
                for box, shard, having in placed(one, number, world):
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
        self._sender = Sender(CodedModel(model, self._encoder, {}), replace(world, mine=mine, holders=holders))

    @property
    def quantization(self) -> Mapping[str, Value] | None:
        """`quantization_config` of config.json for what comes out."""
        return self.codes.quantization if self.codes.written is None else self.codes.written

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
        sender = self._sender.giving(CodedModel(self._model, self._encoder, self._largest(wanted, values)))
        for one in sender.buckets(self._boxes, sent, receivers, size, values, key):
            yield self._finished(one, wanted)

    def _largest(self, wanted: set[str], values: Values | None) -> Largest:
        """The largest magnitudes that scales of `shared` tensors depend on; StorageError on every rank for values of
        any tensor that no codec stores. Collective where any is wanted."""
        asked = [one for one in self._encode.values() if wanted.intersection(part.name for part in one.parts.values())]
        together = frozenset(self.shared)
        shared = [one for one in asked if one.tensor.name in together]
        every = ((cut, held_of(cut, self._world)) for one in shared for cut in self._cuts[one.tensor.name])
        mine = [(cut, held) for cut, held in every if held]
        others = {one.tensor.name: self._held[one.tensor.name] for one in asked if one.tensor.name not in together}
        return largest_of(shared, mine, others, self._model.views(values), self._model.device())

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
    where no tensor takes it; UnsupportedError where `same` asks for a codec that is only read, or for activation
    scales; CoverageError for codes of the folder that the stream has no values for.
    """
    if codec not in CODECS:
        raise UsageError(f"‹codec› {codec!r} is not known", hint=f"choices: {', '.join(CODECS)}")
    folder = source.folder or Path()
    reference = source.folder if source.folder is not None and source.recorded is not None else None
    files = None if reference is None else hf.recorded_layout(reference)
    codes = codes_of(codec, source.config, files, folder, reference)
    if codec != SAME:
        codes = quantised_now(codec, codes, _with_tower(streams[0].plan, source, left_out), ())
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


def _with_tower(plan: Plan, source: Source, left_out: Sequence[str]) -> Plan:
    """`plan` with what a saved folder has beside the model, whose modules `quantization_config` names as plain."""
    held = {name: (source.recorded or {})[name] for name in left_out if name.startswith(source.table.beside)}
    return replace(plan, drafts=(*plan.drafts, *(Draft.whole(name, t.dtype, t.shape) for name, t in held.items())))


def _specs(spec: TensorSpec, encoded: Encoded) -> Iterator[TensorSpec]:
    """The parts of a tensor, which engines take in one call."""
    for part in encoded.parts.values():
        yield TensorSpec(part.name, part.dtype, part.shape, spec.group or spec.name)
