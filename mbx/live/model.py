"""A running Megatron Core model under Hugging Face's names: what each rank holds, and its weights out and in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from converters.errors import UnsupportedError, UsageError
from converters.mcore.cuts import is_vocab
from converters.mcore.flavours import flavoured
from converters.mcore.layout import Layout, count_of
from converters.rows.expr import Value
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hub import resolve
from mbx.formats.registry import open_checkpoint
from mbx.live.adapters import AdapterLayout, Adapters, Merger
from mbx.live.codes import Codec, Coding, coding_of
from mbx.live.delta import Delta, Snapshot, changes
from mbx.live.exchange import World, gather_objects
from mbx.live.held import Held
from mbx.live.load import Filler, load_checkpoint
from mbx.live.planned import Experts, Stream, as_built, chosen, left_out, plan_stream
from mbx.live.routing import TensorSpec
from mbx.live.sending import BUCKET, Bucket, Sender, To, in_shape
from mbx.live.shards import Model, Values, unwrap
from mbx.live.source import Source

#: Tensors to take: a pattern, names, or a predicate of names.
Only = str | Iterable[str] | Callable[[str], bool]


class Live:
    """A model that runs, and the Hugging Face model that it is; see `attach`."""

    def __init__(self, model: Model, source: Source, world: World) -> None:
        announced, heads = replace(source, table=flavoured(source.table, world.sources)), _has_heads(model)
        self.model, self.source, self.world = model, as_built(announced, heads=heads), world
        self.sender = Sender(model, world)
        self._adapters: Adapters | None = None
        self._streams: dict[tuple[str, str | None, bool], Stream] = {}
        self._codings: dict[tuple[str, str | None, str, bool], Coding] = {}
        self.left_out = left_out(announced, self.stream(), heads=heads)

    # --- what it is ----------------------------------------------------------------------------------------------

    def stream(self, experts: Experts = "folder", dtype: str | None = None, *, exact_norms: bool = False) -> Stream:
        """The plan of an export in some spelling, made once."""
        key = (experts, dtype, exact_norms)
        if key not in self._streams:
            self._streams[key] = plan_stream(self.source, self.world.sources, experts, dtype, exact_norms)
        return self._streams[key]

    def coding(
        self, codec: Codec, experts: Experts = "folder", dtype: str | None = None, *, exact_norms: bool = False
    ) -> Coding:
        """An export in the parts of a codec, worked out once; see `coding_of` for what it refuses."""
        key = (experts, dtype, codec, exact_norms)
        if key not in self._codings:
            streams = self.stream(experts, dtype, exact_norms=exact_norms), self.stream(experts, "model")
            self._codings[key] = coding_of(codec, self.model, self.world, self.source, streams, self.left_out)
        return self._codings[key]

    @property
    def has_adapters(self) -> bool:
        """Whether the model has adapters, on any rank."""
        return self.world.adapted

    def is_of(self, chunks: nn.Module | Sequence[nn.Module]) -> bool:
        """Whether these are the chunks that this was attached to, with the parameters that they had then."""
        given = [unwrap(chunk) for chunk in ([chunks] if isinstance(chunks, nn.Module) else chunks)]
        try:
            known = self.model.chunks()
        except UsageError:
            return False
        return len(given) == len(known) and all(a is b for a, b in zip(given, known, strict=True))

    def spec(
        self, *, experts: Experts = "folder", dtype: str | None = None, codec: Codec | None = None
    ) -> tuple[TensorSpec, ...]:
        """Names, shapes, dtypes and groups of all tensors, in the order of `export`; nothing is sent or allocated."""
        return self.stream(experts, dtype).specs if codec is None else self.coding(codec, experts, dtype).specs

    def quantization_config(
        self, codec: Codec, *, experts: Experts = "folder", dtype: str | None = None
    ) -> Mapping[str, Value] | None:
        """What config.json says of an export by a codec, under `quantization_config`; nothing is sent."""
        return self.coding(codec, experts, dtype).quantization

    def local(self, *, experts: Experts = "folder", values: Values | None = None) -> Iterator[Held]:
        """What this rank holds, box by box: a tied head as often as it has names. Nothing is sent or copied."""
        stream = self.stream(experts)
        return self.sender.held(stream.specs, stream.boxes, values)

    # --- what changed ----------------------------------------------------------------------------------------------

    def snapshot(self, *, values: Values | None = None) -> Snapshot:
        """This rank's own shards as they are now, copied to the host; nothing is sent."""
        views = self.model.views(values)
        owned = {place: shards[0] for place, shards in self.world.mine.items() if self.world.owned(place)}
        return Snapshot(self, {p: views[shard].detach().to("cpu", copy=True) for p, shard in owned.items()})

    def changed_since(
        self, snapshot: Snapshot, *, experts: Experts = "folder", values: Values | None = None
    ) -> Iterator[Delta]:
        """Elements that this rank owns and that are not as they were, by Hugging Face name and index; nothing is sent.

        All ranks' deltas together are the change of the model, each element once. UsageError for the snapshot of
        another attachment: a model that was rebuilt has none.
        """
        if snapshot.of is not self:
            raise UsageError("the snapshot is of another attachment", hint="take one of this")
        stream, views = self.stream(experts), self.sender.views(values)
        shapes = {spec.name: spec.shape for spec in stream.specs}

        def pairs() -> Iterator[tuple[Held, torch.Tensor]]:
            for spec in stream.specs:
                for box in stream.boxes[spec.name]:
                    place = box.source, box.chunk
                    if place in snapshot.shards:
                        held = Held(spec.name, box.index, views(box), False, spec.dtype, box.shift)
                        yield held, in_shape(snapshot.shards[place], box)

        return changes(pairs(), shapes)

    # --- weights in ------------------------------------------------------------------------------------------------

    def load(self, source: str | Path | Checkpoint | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the model: from a Hugging Face folder or hub model, from a Megatron checkpoint of any layout, or from
        (name, tensor) pairs under Hugging Face's names, whole and in any order, the same on every rank.

        Every tensor must come, once. Where an optimizer keeps copies of its own, have it read the model again
        (`reload_model_params`). Nothing is sent: each rank reads the rows that it holds.
        """
        if isinstance(source, str | Path):
            source = open_checkpoint(resolve(str(source)).path)
        if isinstance(source, Checkpoint):
            vocab = next((t.shape[0] for key, t in self.world.sources.items() if is_vocab(key)), 1)
            layout = Layout(vocab_divisor=vocab)
            load_checkpoint(self.model.chunks(), source, self.source.fields, self.source.table, layout)
            return
        stream = self.stream(dtype="model")
        if stream.spread:
            fact = f"`{stream.spread}` has one row for several of the model, of which tensors fill the first alone"
            raise UnsupportedError(fact, hint="load a folder, or a checkpoint")
        filler = Filler(self.model.views(), self.world, stream.specs, stream.boxes, self.left_out)
        for name, tensor in source:
            filler.take(name, tensor)
        filler.finish(count_of(self.source.fields, "model.vocab_size"))

    # --- weights out -----------------------------------------------------------------------------------------------

    def export(
        self,
        bucket: int = BUCKET,
        to: To = "all",
        experts: Experts = "folder",
        dtype: str | None = None,
        *,
        codec: Codec | None = None,
        values: Values | None = None,
        only: Only | None = None,
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every tensor by its name, whole, in one order on all ranks; None on ranks that do not receive it.

        Collective: all ranks iterate to the end. A tensor is a view of its bucket's memory, which it keeps alive; two
        names never share values. Beside the model there are at most two buckets and the largest tensor.
        `dtype` is that of the folder by default, "model" what the model holds, or one to cast floats to.
        `codec` gives products as codes and scales under the folder's names, as `mbx convert mcore-to-hf --codec` does.
        """
        for one in self.buckets(bucket, to, experts, dtype, codec=codec, values=values, only=only):
            yield from one

    def buckets(
        self,
        bucket: int = BUCKET,
        to: To = "all",
        experts: Experts = "folder",
        dtype: str | None = None,
        *,
        codec: Codec | None = None,
        values: Values | None = None,
        only: Only | None = None,
    ) -> Iterator[Bucket]:
        """`export`, a bucket of tensors at a time: one buffer to hand to another process."""
        if codec is not None:
            return self.coding(codec, experts, dtype).buckets(bucket, to, values, only)
        stream = self.stream(experts, dtype)
        receivers = self.sender.receivers(stream.boxes, to)
        key = (experts, dtype, to, bucket) if only is None else None
        return self.sender.buckets(stream.boxes, chosen(stream.specs, only), receivers, bucket, values, key)

    def adapters(
        self, layout: AdapterLayout = "peft", to: To = "all", *, bucket: int = BUCKET
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every factor of the model's adapters by its name, whole, in one order on all ranks; the base does not move.

        Collective. `layout` is whose names they have: PEFT's as its folders do; vLLM's, with one adapter of all
        experts of a layer; SGLang's, with one of each. UsageError for a model without adapters.
        """
        return self._found_adapters().export(layout, to, bucket)

    def held_adapters(self, layout: AdapterLayout = "peft") -> Iterator[Held]:
        """What this rank holds of the adapters' factors, box by box, to read or fill; collective the first time."""
        return self._found_adapters().held(layout)

    def merged(
        self,
        bucket: int = BUCKET,
        to: To = "all",
        experts: Experts = "folder",
        dtype: str | None = None,
        *,
        only: Only | None = None,
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """`export` with the adapters merged, in fp32 and rounded once; the model stays as it is. Collective."""
        stream = self.stream(experts, "model")
        merger = Merger(self._found_adapters(), stream)
        wanted = {spec.name: spec.dtype for spec in self.stream(experts, dtype).specs}
        for name, tensor in self.export(bucket, to, experts, "model", only=only):
            yield name, None if tensor is None else merger.merged(name, tensor, wanted[name])

    def _found_adapters(self) -> Adapters:
        self.model.chunks()
        if self._adapters is None:
            self._adapters = Adapters(self.model, self.source)
        return self._adapters

    def save(
        self,
        folder: str | Path,
        dtype: str | None = None,
        *,
        codec: Codec | None = None,
        values: Values | None = None,
        files: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
        bucket: int = BUCKET,
        exact_norms: bool = False,
    ) -> None:
        """Write the model as a Hugging Face folder, all ranks a share of it; it appears whole, or not at all.

        Collective; all ranks see one file system. The folder that this was attached to gives side files, shards and
        what the model has none of (a vision tower and, without a codec, prediction layers that were not built);
        `files` are texts to put beside, or in place of its own.
        `exact_norms` writes norms that are stored as gamma in 16 bits, and in the folder as 1 + gamma, in fp32.
        `codec` stores products as codes and scales, as `mbx convert mcore-to-hf --codec` does.
        """
        from mbx.live.save import How, save

        how = How(dtype, codec, overwrite=overwrite, bucket=bucket, exact_norms=exact_norms)
        save(self, Path(folder), how, values, files or {})

    def save_adapters(self, folder: str | Path, config: Mapping[str, Value], *, overwrite: bool = False) -> None:
        """Write the adapters as a PEFT folder, all or nothing; `config` are keys of adapter_config.json.

        `r` and `lora_alpha` have to be among them; targets and other ranks are told by the model. Collective.
        """
        from mbx.live.save import save_adapters

        save_adapters(self._found_adapters(), Path(folder), config, overwrite=overwrite)

    def digest(
        self,
        experts: Experts = "folder",
        dtype: str | None = None,
        *,
        codec: Codec | None = None,
        values: Values | None = None,
        only: Only | None = None,
        bucket: int = BUCKET,
    ) -> dict[str, str]:
        """SHA-256 of the bytes of each tensor that `export` gives, by name, the same on every rank.

        Collective; each rank hashes its share.
        """
        specs = chosen(self.spec(experts=experts, dtype=dtype, codec=codec), only)
        if codec is not None:
            tensors = self.coding(codec, experts, dtype).each_at_one(bucket, values, only)
        else:
            tensors = self.sender.each_at_one(self.stream(experts, dtype).boxes, specs, bucket, values)
        mine = {}
        for spec, tensor in tensors:
            flat = tensor.contiguous().view(-1).view(torch.uint8).cpu()
            mine[spec.name] = hashlib.sha256(flat.numpy().data).hexdigest()
        found = {name: digest for part in gather_objects(mine) for name, digest in part.items()}
        return {spec.name: found[spec.name] for spec in specs}


def _has_heads(model: Model) -> bool:
    return any(getattr(getattr(chunk, "config", None), "mtp_num_layers", None) for chunk in model.chunks())
