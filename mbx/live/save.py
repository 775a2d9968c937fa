"""A live model as a Hugging Face folder: each rank writes the tensors that it is given, and one commits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.checksums import crc32
from converters.codecs import quantization_of
from converters.engine.plan import Draft
from converters.errors import MbxError
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import config_text
from mbx.formats.files import FileSink, FileSource
from mbx.formats.placement import Order
from mbx.formats.registry import format_named, open_hf
from mbx.formats.shards import settle_index
from mbx.live.adapters import Adapters, Factors
from mbx.live.exchange import agreed, gather_objects
from mbx.live.planned import Stream
from mbx.live.routing import TensorSpec
from mbx.live.shards import Values
from mbx.run.commit import PartialFolder, check_free_space, check_target, partial_path
from mbx.run.config_file import edited_config
from mbx.run.export_codec import PLAIN
from mbx.run.job import DEFAULT_MAX_SHARD, Job, Options
from mbx.run.side_files import manifest_text, write_file, write_headers, write_side_files
from mbx.untrusted.small_files import SETTINGS, read_small

if TYPE_CHECKING:
    from mbx.live.model import Live

_BLOCK = 4 << 20


def save(
    live: Live,
    target: Path,
    dtype: str | None,
    values: Values | None,
    files: Mapping[str, bytes],
    *,
    overwrite: bool,
    bucket: int,
    exact_norms: bool,
) -> None:
    """See `Live.save`."""
    stream = live.stream(dtype=dtype, exact_norms=exact_norms)
    with agreed():
        job, carried = _job(live, stream, target, dtype, files, overwrite=overwrite)
    write(job, live.sender.each_at_one(stream.boxes, stream.specs, bucket, values), carried)


def save_adapters(adapters: Adapters, target: Path, config: Mapping[str, Value], *, overwrite: bool) -> None:
    """See `Live.save_adapters`."""
    with agreed():
        job = adapters.job(target, config, Options(overwrite=overwrite))
    found = Factors.of(job.plan)
    write(job, adapters.sender.each_at_one(found.boxes, found.specs), {})


def write(job: Job, tensors: Iterable[tuple[TensorSpec, torch.Tensor]], carried: Mapping[str, StoredTensor]) -> None:
    """Carry out a job whose tensors each reach one rank; `carried` are copied from its source.

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
        with agreed():
            failure: MbxError | None = None
            for spec, tensor in tensors:
                try:  # to the end whatever happens: the others wait for what this rank has to give
                    if failure is None:
                        crcs[spec.name] = [_write(job, sink, spec.name, tensor)]
                except MbxError as error:
                    failure = error
            if failure is not None:
                raise failure
            if main:
                crcs |= {name: [_copy(job, sink, source, tensor)] for name, tensor in carried.items()}
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


def _copy(job: Job, sink: FileSink, source: FileSource, tensor: StoredTensor) -> int:
    """Copy a tensor of the folder; returns its CRC-32."""
    (into,) = job.tensors[tensor.name].chunks
    (chunk,) = tensor.chunks
    start, crc = source.data_start(chunk), 0
    for at in range(0, tensor.nbytes, _BLOCK):
        block = memoryview(bytearray(min(_BLOCK, tensor.nbytes - at)))
        source.read_into(chunk.file, start + at, block)
        sink.write(into.file, into.start + at, block)
        crc = crc32(block, crc)
    return crc


def _job(
    live: Live, stream: Stream, target: Path, dtype: str | None, files: Mapping[str, bytes], *, overwrite: bool
) -> tuple[Job, dict[str, StoredTensor]]:
    """What a conversion would plan, and the tensors that the folder has and the model has not."""
    folder, quantised = live.source.folder, quantization_of(live.source.config)
    plan, options = stream.plan, Options(overwrite=overwrite)
    carried: dict[str, StoredTensor] = {}
    recorded, sides = None, dict[str, Path]()
    if folder is not None and live.source.recorded is not None:
        opened = open_hf(folder)
        behind = live.source.table.beside
        carried = {n: opened.tensors[n] for n in live.left_out if n in opened.tensors and n.startswith(behind)}
        recorded = hf.recorded_layout(folder)
        if recorded is not None and quantised is not None:
            recorded = hf.decoded_layout(recorded, quantised)
    drafts = (*plan.drafts, *(Draft.whole(t.name, t.dtype, t.shape) for t in carried.values()))
    plan = replace(plan, drafts=drafts)
    placed = format_named("huggingface", "hf").place(Order(plan, None, recorded, DEFAULT_MAX_SHARD))
    texts = dict(placed.texts)
    if folder is not None:
        sides = {name: folder / name for name in hf.side_files(folder)}
        settle_index(placed, sides, texts)
        original = read_small(folder / hf.CONFIG, SETTINGS)
        cast = None if dtype == "model" else dtype
        if (edited := edited_config(original, cast, PLAIN)) != original:
            texts[hf.CONFIG] = edited
    else:
        texts[hf.CONFIG] = config_text(live.source.config, [draft.dtype for draft in drafts])
    texts |= files
    sides = {name: path for name, path in sides.items() if name not in texts}
    root = folder or Path()
    return Job(plan, root, target, root, sides, texts, options, placed), carried
