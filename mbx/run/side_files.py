"""What a run writes beside the tensors: headers before them; side files, index and manifest behind them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.checksums import crc32
from converters.engine.plan import Plan
from converters.errors import CoverageError
from converters.protocols import Source
from converters.stored import read_rows
from converters.tensors import StoredTensor
from mbx.formats import hf, torch_dist
from mbx.formats.files import FileSink, FileSource, os_failure
from mbx.run import manifest
from mbx.untrusted.small_files import open_regular

if TYPE_CHECKING:
    from mbx.run.job import Job

_BLOCK = 4 << 20
_EQUAL_BLOCK = 8 << 20


def write_headers(job: Job, sink: FileSink) -> None:
    """What stands in the files beside tensors: safetensors headers, or the payloads of objects."""
    for file, start, data in job.placed.before():
        sink.write(file, start, memoryview(data))


def check_equal(job: Job, source: FileSource) -> None:
    """Tensors that the config declares tied must be: an untied head is never dropped.

    Those that a codec stores are when their parts are, codes and scales.
    """
    for name, other in job.plan.equal:
        a, b = _as_stored(job, name), _as_stored(job, other)
        if a.keys() != b.keys() or not all(_same_bytes(source, a[role], b[role]) for role in a):
            raise CoverageError(
                f"`{name}` should repeat `{other}`, and does not",
                hint="config.json says they are tied: set `tie_word_embeddings` to false to keep both"
                if not job.plan.direction.startswith("adapter")
                else "one linear shares one lora_A: leave out ‹fused› to keep them apart",
            )


def check_padded(job: Job, source: FileSource) -> None:
    """Rows of the source that the target lacks must be zeros: an export writes such again."""
    for line in odd_padding(job.plan, source):
        raise CoverageError(f"{line}, and no place for them")


def odd_padding(plan: Plan, source: Source) -> Iterator[str]:
    """What stands in a plan's sources where zeros should, a line for each such tensor."""
    for name, first in plan.padded:
        tensor = plan.sources[name]
        if (more := tensor.shape[0] - first) and read_rows(tensor, source, (), first, more).any():
            yield f"`{name}` has {more} rows behind its {first} that are not zeros"


def check_repeated(job: Job, source: FileSource) -> None:
    """Rows of the source of which the target keeps one must be the same: what the others say would be lost.

    Megatron Core trains a gate for each channel where a model has one for a head.
    """
    for move in (move for unit in job.plan.units for move in unit.moves if move.target.slot.times > 1):
        region, times, tensor = move.source, move.target.slot.times, job.plan.sources[move.source.tensor]
        for group in range(region.slot.groups):
            first = group * region.slot.stride + region.slot.start
            rows = read_rows(tensor, source, region.index, first, region.slot.size)
            alike = rows.reshape(-1, times, rows.shape[1])
            if (alike != alike[:, :1]).any():
                raise CoverageError(
                    f"`{move.target.tensor}` has one row for {times} of `{tensor.name}`; those from {first} on differ",
                    hint="another trainer gave each of them a value of its own, which this format cannot hold; "
                    "`mbx train` keeps them alike",
                )


def _as_stored(job: Job, name: str) -> Mapping[str, StoredTensor]:
    """A source tensor as its file holds it: in the parts of its codec, or whole."""
    encoded = job.plan.encoded.get(name)
    return {"": job.plan.sources[name]} if encoded is None else encoded.parts


def _same_bytes(source: FileSource, a: StoredTensor, b: StoredTensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    left, right = bytearray(_EQUAL_BLOCK), bytearray(_EQUAL_BLOCK)
    for at in range(0, a.nbytes, _EQUAL_BLOCK):
        count = min(_EQUAL_BLOCK, a.nbytes - at)
        for tensor, buffer in ((a, left), (b, right)):
            chunk = tensor.chunks[0]
            source.read_into(chunk.file, source.data_start(chunk) + at, memoryview(buffer)[:count])
        if left[:count] != right[:count]:
            return False
    return True


def file_names(job: Job) -> set[str]:
    """Every file that the job makes, but for the manifest."""
    names = {*job.texts, *job.side_files, *job.packed, *(job.base + file for file in job.file_sizes)}
    if job.sidecars is not None:
        names |= {torch_dist.TRACKER, *(job.base + name for name in job.placed.late_names)}
    return names


def write_side_files(job: Job, root: Path, source: FileSource) -> dict[str, int]:
    """Copy side files byte for byte and write generated ones; returns the CRC-32 of each."""
    contents: dict[str, Iterable[bytes]] = {name: [data] for name, data in job.texts.items()}
    contents |= {name: _blocks(origin) for name, origin in job.side_files.items()}
    contents |= {name: hf.pack_kept(tensors, source) for name, tensors in job.packed.items()}
    if job.sidecars is not None:
        contents |= {job.base + name: [data] for name, data in job.placed.late(job.sidecars.common).items()}
        contents[torch_dist.TRACKER] = [str(job.sidecars.iteration).encode()]
    return {name: write_file(root / name, blocks, sync=job.options.sync) for name, blocks in contents.items()}


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(open_regular(path), "rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
    except OSError as error:
        raise os_failure(error, f"cannot read `{path}`") from error


def write_file(path: Path, blocks: Iterable[bytes], *, sync: bool) -> int:
    """Write a file and, where `sync` is set, flush it to the disk; returns its CRC-32."""
    crc = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for block in blocks:
                stream.write(block)
                crc = crc32(block, crc)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
    except OSError as error:
        raise os_failure(error, f"writing `{path}`") from error
    return crc


def manifest_text(job: Job, sink: FileSink, crcs: Mapping[str, list[int]], files: Mapping[str, int]) -> bytes:
    """The manifest, container bytes read back from what was written."""
    prefix = job.base
    tensors, in_file = {}, {file: list[manifest.Span]() for file in job.file_sizes}
    for name, tensor in job.tensors.items():
        tensors[name] = manifest.spans_of(tensor, crcs[name], prefix, lambda t, n: sink.data_start(t.chunks[n]))
        for span in tensors[name]:
            in_file[span.file.removeprefix(prefix)].append(span)
    back = FileSource(sink.root)
    try:
        containers = {
            prefix + file: (size, manifest.gap_crc(back.read_into, file, in_file[file], size))
            for file, size in job.file_sizes.items()
        }
    finally:
        back.close()
    return manifest.compose(job, tensors, containers, files)
