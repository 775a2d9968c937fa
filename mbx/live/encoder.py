"""Values that a rank holds as parts of a codec, and the scales that the values of several ranks decide together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from converters.codecs.arithmetic.reencode import reencode
from converters.codecs.decode import Encoded, read_part
from converters.engine.boxes import Box, Index, sizes_of
from converters.errors import StorageError
from converters.tensors import StoredTensor
from converters.torch_casts import TORCH_DTYPES
from mbx.formats.files import FileSource
from mbx.live.cuts import CodedShard, Cut, part_index
from mbx.live.moves import assign
from mbx.live.sending import in_shape
from mbx.live.shards import Model, Shard, Values, Views

#: Largest magnitudes, fp32, under each scale that lies beyond what one rank holds, by the tensor's name.
Largest = Mapping[str, torch.Tensor]


class Encoder:
    """Makes parts of values, with what the source had: the scales of blocks that did not change, and constants.

    `kept` are those by role, by the tensor's name, in `folder`.
    """

    def __init__(self, kept: Mapping[str, Mapping[str, StoredTensor]], folder: Path | None) -> None:
        self._stored = {} if folder is None else kept
        self._folder, self._read = folder, dict[str, dict[str, torch.Tensor]]()

    def parts(
        self,
        encoded: Encoded,
        values: torch.Tensor,
        index: Index | None = None,
        largest: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The parts of a tensor's `values`, or of those that `index` picks; StorageError for what they cannot hold.

        `largest` are the magnitudes of the whole tensor where a scale depends on them.
        """
        codec, shape = encoded.codec, encoded.tensor.shape
        try:
            if largest is not None and index is not None:
                assert codec.maxima_role is not None
                own = largest[part_index(encoded, codec.maxima_role, index)]
                made = codec.encode_under(values, own, shape=shape)
            else:
                known = self._known(encoded, index, values.device)
                scale = known.pop("scale", None)
                made = reencode(codec.holding(known) if known else codec, values, scale, shape)
        except StorageError as error:
            error.details = (*error.details, f"`{encoded.tensor.name}`")
            raise
        return {role: made[role].to(TORCH_DTYPES[part.dtype]).contiguous() for role, part in encoded.parts.items()}

    def _known(self, encoded: Encoded, index: Index | None, device: torch.device) -> dict[str, torch.Tensor]:
        name = encoded.tensor.name
        if name not in self._stored or self._folder is None:
            return {}
        if name not in self._read:
            source = FileSource(self._folder)
            try:
                self._read[name] = {role: read_part(source, one, None) for role, one in self._stored[name].items()}
            finally:
                source.close()
        whole = self._read[name]
        if index is not None:
            whole = {role: tensor[part_index(encoded, role, index)] for role, tensor in whole.items()}
        return {role: tensor.to(device) for role, tensor in whole.items()}


class CodedViews(Views):
    """A rank's shards, and parts of what they hold; those that were made last are kept, for a scale follows codes."""

    def __init__(self, views: Views, encoder: Encoder, largest: Largest) -> None:
        self._views, self._encoder, self._largest = views, encoder, largest
        self._last: tuple[Cut, dict[str, torch.Tensor]] | None = None

    def taken(self, shard: Shard) -> tuple[torch.Tensor, bool]:
        if not isinstance(shard, CodedShard):
            return self._views.taken(shard)
        if self._last is None or self._last[0] is not shard.cut:
            self._last = None  # before others are made
            cut, values = shard.cut, joined(self._views, shard.cut, shard.held)
            made = self._encoder.parts(cut.encoded, values, cut.index, self._largest.get(cut.encoded.tensor.name))
            self._last = cut, made
        return self._last[1][shard.role], True


@dataclass(frozen=True, slots=True)
class CodedModel:
    """A model whose views have parts of a codec, too."""

    model: Model
    encoder: Encoder
    largest: Largest

    def device(self) -> torch.device:
        return self.model.device()

    def views(self, values: Values | None = None) -> Views:
        return CodedViews(self.model.views(values), self.encoder, self.largest)


def joined(views: Views, cut: Cut, held: Sequence[Shard]) -> torch.Tensor:
    """What a cut holds, in the model's dtype: the live memory itself where one box has it."""
    found = [in_shape(views[shard], box) for shard, box in zip(held, cut.boxes, strict=True)]
    if len(found) == 1:
        return found[0]
    dtype = TORCH_DTYPES[cut.encoded.tensor.dtype]
    out = torch.empty(sizes_of(cut.index), dtype=dtype, device=found[0].device)
    for box, values in zip(cut.boxes, found, strict=True):
        inside = zip(box.index, cut.index, strict=True)
        where = tuple(slice(own.start - all_.start, own.stop - all_.start, own.step) for own, all_ in inside)
        assign(out[where], values)
    return out


def largest_of(
    shared: Sequence[Encoded],
    mine: Iterable[tuple[Cut, Sequence[Shard]]],
    others: Mapping[str, Sequence[tuple[Box, Shard]]],
    views: Views,
    device: torch.device,
) -> Largest:
    """The largest magnitudes that scales of the tensors `shared` depend on, found by all ranks in one collective.

    `mine` are this rank's cuts of them, each with the shards of its boxes. `others` are the tensors beside them, each
    with what this rank holds of it: no scale of theirs depends on other ranks, but a rank that met a value which no
    codec stores only when it encodes would leave the rest waiting. Raises NotFinite on every rank for either.
    """
    parts = {whole.tensor.name: whole.parts[str(whole.codec.maxima_role)] for whole in shared}
    shapes = {**{name: part.shape for name, part in parts.items()}, **dict.fromkeys(others, (1,))}
    if not shapes:
        return {}
    every = torch.zeros(sum(map(prod, shapes.values())), device=device)
    split = torch.split(every, list(map(prod, shapes.values())))
    found = {name: one.view(shape) for (name, shape), one in zip(shapes.items(), split, strict=True)}
    for cut, held in mine:
        encoded, role = cut.encoded, str(cut.encoded.codec.maxima_role)
        grain = encoded.codec.grain(role, encoded.tensor.shape) or ()
        dims = [dim for dim, size in enumerate(grain) if size > 1]
        own = joined(views, cut, held).abs().amax(dims, keepdim=True).float()
        into = found[encoded.tensor.name][part_index(encoded, role, cut.index)]
        # NaN is no largest to a collective; as infinity it is everybody's.
        into.copy_(torch.maximum(into, own.nan_to_num(torch.inf, torch.inf).to(device).view(into.shape)))
    for name, boxes in others.items():
        for box, shard in boxes:
            least, most = in_shape(views[shard], box).aminmax()
            found[name].add_((least * 0 + most * 0).float().nan_to_num(torch.inf).to(device))
    torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MAX)
    if not bool(every.isfinite().all()):
        bad = next(name for name, one in found.items() if not bool(one.isfinite().all()))
        raise StorageError(
            f"`{bad}` holds NaN or infinite values, which no codec stores",
            hint="export it plainly, or find where the values became non-finite",
            details=(f"`{bad}`",),
        )
    return {name: found[name] for name in parts}
