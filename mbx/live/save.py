"""A live model as a Hugging Face folder: each rank writes the tensors that it is given, and one commits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.checksums import crc32
from converters.codecs import quantization_of
from converters.engine.plan import Draft
from converters.errors import MbxError
from converters.protocols import Source
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import config_text
from mbx.formats.files import FileSink, FileSource
from mbx.formats.placement import Order
from mbx.formats.prediction import LeftOut, left_out
from mbx.formats.registry import format_named, open_hf
from mbx.formats.shards import settle_index
from mbx.formats.views import hf_tensors
from mbx.live.adapters import Adapters, Factors
from mbx.live.codes import Codec, Coding
from mbx.live.exchange import agreed, gather_objects
from mbx.live.planned import Stream
from mbx.live.routing import TensorSpec
from mbx.live.shards import Values
from mbx.run.commit import PartialFolder, check_free_space, check_target, partial_path
from mbx.run.config_file import edited_config
from mbx.run.export_codec import PLAIN, SAME
from mbx.run.job import DEFAULT_MAX_SHARD, Job, Options
from mbx.run.side_files import manifest_text, write_file, write_headers, write_side_files
from mbx.untrusted.small_files import SETTINGS, read_small

if TYPE_CHECKING:
    from mbx.live.model import Live

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class How:
    """What is asked for of a folder; see `Live.save`. `beside`: in place of what the folder has and the model not."""

    dtype: str | None
    codec: Codec | None
    overwrite: bool
    bucket: int
    exact_norms: bool
    beside: Beside | None = None


@dataclass(frozen=True, slots=True)
class Beside:
    """Tensors that the model has none of, copied as they are from `source`, and `copies` of those that it has, with
    the name of each."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    source: Source | None = None


def save(live: Live, target: Path, how: How, values: Values | None, files: Mapping[str, bytes]) -> None:
    """See `Live.save`."""
    stream, coding = live.stream(dtype=how.dtype, exact_norms=how.exact_norms), None
    with agreed():
        if how.codec is not None:
            coding = live.coding(how.codec, dtype=how.dtype, exact_norms=how.exact_norms)
        beside = _beside(live, how) if how.beside is None else how.beside
        job = _job(live, stream, coding, target, how, files, beside)
    if coding is not None:
        tensors = coding.each_at_one(how.bucket, values)
    else:
        tensors = live.sender.each_at_one(stream.boxes, stream.specs, how.bucket, values)
    write(job, tensors, beside)


def save_adapters(adapters: Adapters, target: Path, config: Mapping[str, Value], *, overwrite: bool) -> None:
    """See `Live.save_adapters`."""
    with agreed():
        job = adapters.job(target, config, Options(overwrite=overwrite))
    found = Factors.of(job.plan)
    write(job, adapters.sender.each_at_one(found.boxes, found.specs), Beside())


def write(job: Job, tensors: Iterable[tuple[TensorSpec, torch.Tensor]], beside: Beside) -> None:
    """Carry out a job whose tensors each reach one rank; what lies `beside` the model is copied.

    What fails on one rank fails on all, and leaves nothing. Collective.
    """
    main, folder, target = torch.distributed.get_rank() == 0, None, job.target
    with ExitStack() as stack:
        with agreed():
            source = FileSource(job.source_root)
            stack.callback(source.close)
            if main:
                overwrite = job.options.overwrite
                check_target(target, [job.source_root] if job.side_files else [], overwrite=overwrite)
                folder = stack.enter_context(PartialFolder(target, overwrite=overwrite))
                check_free_space(target, job.output_bytes)
        with agreed():
            sink = FileSink(partial_path(target), job.file_sizes)
            stack.callback(partial(sink.close, sync=False))
            if main:
                write_headers(job, sink)
        crcs: dict[str, list[int]] = {}
        names = {of: [name for name, one in beside.copies.items() if one == of] for of in beside.copies.values()}
        with agreed():
            failure: MbxError | None = None
            for spec, tensor in tensors:
                try:  # to the end whatever happens: the others wait for what this rank has to give
                    if failure is None:
                        for name in (spec.name, *names.get(spec.name, ())):
                            crcs[name] = [_write(job, sink, name, tensor)]
                except MbxError as error:
                    failure = error
            if failure is not None:
                raise failure
            if main:
                crcs |= {n: [_copy(job, sink, beside.source or source, one)] for n, one in beside.tensors.items()}
            sink.close(sync=job.options.sync)
        every = {name: own for part in gather_objects(crcs) for name, own in part.items()}
        with agreed():
            if folder is not None:
                written = write_side_files(job, folder.path, source)
                text = manifest_text(job, sink, {name: every[name] for name in job.tensors}, written)
                write_file(folder.path / hf.MANIFEST, [text], sync=job.options.sync)
                folder.commit(sync=job.options.sync)


def _write(job: Job, sink: FileSink, name: str, tensor: torch.Tensor) -> int:
    """Write a whole tensor; returns its CRC-32."""
    (chunk,) = job.tensors[name].chunks
    data = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data
    sink.write(chunk.file, chunk.start, data)
    return crc32(data)


def _copy(job: Job, sink: FileSink, source: Source, tensor: StoredTensor) -> int:
    """Copy a tensor that the model has not; returns its CRC-32."""
    (into,) = job.tensors[tensor.name].chunks
    (chunk,) = tensor.chunks
    start, crc = source.data_start(chunk), 0
    for at in range(0, tensor.nbytes, _BLOCK):
        block = memoryview(bytearray(min(_BLOCK, tensor.nbytes - at)))
        source.read_into(chunk.file, start + at, block)
        sink.write(into.file, into.start + at, block)
        crc = crc32(block, crc)
    return crc


def _beside(live: Live, how: How) -> Beside:
    """What the folder attached to has and the model has not: modules around it and, of a plain folder, prediction
    layers that it was built without."""
    s = live.source
    if s.folder is None or s.recorded is None:
        return Beside()
    opened, ahead = open_hf(s.folder), LeftOut()
    tensors, source = (opened.tensors, opened.source) if how.codec else hf_tensors(opened)
    if not how.codec:
        ahead = left_out(s.table, s.table.config.to_mcore(s.config), s.fields, tensors)
    names = [*(n for n in live.left_out if n in tensors and n.startswith(s.table.beside)), *ahead.tensors]
    return Beside({name: tensors[name] for name in names}, ahead.copies, source)


def _job(
    live: Live,
    stream: Stream,
    coding: Coding | None,
    target: Path,
    how: How,
    files: Mapping[str, bytes],
    beside: Beside,
) -> Job:
    """What a conversion would plan, with what lies `beside` the model."""
    folder, codec = live.source.folder, how.codec or PLAIN
    options = Options(overwrite=how.overwrite, codec=codec)
    recorded, sides = None, dict[str, Path]()
    if folder is not None and live.source.recorded is not None:
        recorded = _files_before(folder, live.source.config, codec)
    own = {draft.name: draft for draft in stream.plan.drafts}
    drafts = [*own.values(), *(Draft.whole(t.name, t.dtype, t.shape) for t in beside.tensors.values())]
    drafts += [replace(own[of], name=name) for name, of in beside.copies.items()]
    if coding is not None:
        drafts = [part for draft in drafts for part in coding.drafts(draft)]
    plan = replace(stream.plan, drafts=tuple(drafts))
    placed = format_named("huggingface", "hf").place(Order(plan, None, recorded, DEFAULT_MAX_SHARD))
    texts, written = dict(placed.texts), None if coding is None else coding.codes.written
    if folder is not None:
        sides = {name: folder / name for name in hf.side_files(folder)}
        settle_index(placed, sides, texts)
        if codec != SAME:
            sides.pop(hf.QUANT_CONFIG, None)
        original = read_small(folder / hf.CONFIG, SETTINGS)
        cast = None if how.dtype == "model" else how.dtype
        if (edited := edited_config(original, cast, codec, quantization=written)) != original:
            texts[hf.CONFIG] = edited
    else:
        made = config_text(live.source.config, [draft.dtype for draft in stream.plan.drafts])
        texts[hf.CONFIG] = edited_config(made, None, SAME, quantization=written)
    texts |= files
    sides = {name: path for name, path in sides.items() if name not in texts}
    root = folder or Path()
    return Job(plan, root, target, root, sides, texts, options, placed)


def _files_before(folder: Path, config: Mapping[str, Value], codec: str) -> tuple[hf.WeightFile, ...] | None:
    """The weight files of a folder, with the tensors that `codec` writes; None where it writes others."""
    recorded, quantised = hf.recorded_layout(folder), quantization_of(config)
    if codec == SAME or recorded is None:
        return recorded
    if codec != PLAIN:
        return None
    return recorded if quantised is None else hf.decoded_layout(recorded, quantised)
