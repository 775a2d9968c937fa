"""The three conversions as one sequence: open, plan, place, stream, commit."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.coverage import Waivers
from converters.errors import CoverageError, StorageError
from converters.exporter import HfTensor, plan_export
from converters.expr import Value
from converters.importer import plan_import
from converters.layout import Layout
from converters.plan import Plan, requested_dtype
from converters.stream import Engine
from converters.tensors import StoredTensor
from mbx import __version__
from mbx.io import hf, torch_dist
from mbx.io.archive import extra_state_archive
from mbx.io.commit import PartialFolder, check_free_space, check_target, write_synced
from mbx.io.files import FileSink, FileSource
from mbx.registry import table_for

DEFAULT_MAX_MEMORY = 1 << 30
DEFAULT_MAX_SHARD = 5 * 10**9
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a conversion runs, whatever its direction."""

    dtype: str | None = None
    layout: Layout = Layout()
    mapping: str | None = None
    waivers: Waivers = Waivers()
    allow_unused_keys: tuple[str, ...] = ()
    overwrite: bool = False
    workers: int = min(8, os.cpu_count() or 1)
    max_memory: int = DEFAULT_MAX_MEMORY
    max_shard_bytes: int = DEFAULT_MAX_SHARD
    sync: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A planned conversion: everything a dry run shows and a run needs."""

    plan: Plan
    source: Path
    target: Path
    source_root: Path
    tensors: Mapping[str, StoredTensor]
    file_sizes: Mapping[str, int]
    side_files: Mapping[str, Path]
    texts: Mapping[str, bytes]
    options: Options
    placed: torch_dist.Placement | hf.Placement
    origin: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def output_bytes(self) -> int:
        """Bytes the target will occupy, containers included."""
        return sum(self.file_sizes.values()) + sum(map(len, self.texts.values()))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run did."""

    target: Path
    seconds: float
    bytes_written: int


def plan_hf_to_mcore(
    source: Path, target: Path, options: Options, origin: Mapping[str, str | None] | None = None
) -> Job:
    """Plan a Hugging Face folder → torch_dist conversion; headers are read, nothing is written."""
    check_target(source, target, overwrite=options.overwrite)
    folder = hf.open_hf(source)
    table = table_for(folder.config, options.mapping)
    plan = plan_import(
        table,
        folder.config,
        folder.tensors,
        options.layout,
        dtype=requested_dtype(options.dtype),
        waivers=options.waivers,
        allow_unused_keys=options.allow_unused_keys,
    )
    placed = torch_dist.place(plan.drafts, plan.objects)
    at = f"{torch_dist.ITERATION}/"
    sides = {f"{at}hf/{name}": source / name for name in folder.side_files}
    texts = {f"{at}hf/{hf.LAYOUT}": hf.record_layout(folder).encode()}
    return Job(
        plan, source, target, source, placed.tensors, placed.file_sizes, sides, texts, options, placed, origin or {}
    )


def plan_mcore_to_hf(source: Path, target: Path, options: Options, hf_config: Path | None = None) -> Job:
    """Plan a torch_dist → Hugging Face conversion; headers are read, nothing is written.

    `hf_config` is a folder with `config.json` and tokenizer files, needed only where the checkpoint carries none.
    """
    check_target(source, target, overwrite=options.overwrite)
    opened = torch_dist.open_torch_dist(source)
    reference = hf_config or opened.hf
    if reference is None:
        raise StorageError(
            f"`{opened.iteration}` carries no Hugging Face side files (hf/)",
            hint="name a folder with config.json and the tokenizer: --hf-config DIR",
        )
    config = hf.read_config(reference)
    table = table_for(config, options.mapping)
    recorded_files = hf.recorded_layout(reference)
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and recorded_files is not None:
        recorded_files = hf.decoded_layout(recorded_files, quantization)
    recorded: dict[str, HfTensor] | None = None
    if recorded_files is not None:
        recorded = {name: tensor for file in recorded_files for name, tensor in file.tensors.items()}
    plan = plan_export(
        table,
        table.config.to_mcore(config, allow_unused=options.allow_unused_keys),
        model_tensors(opened.dcp.tensors),
        recorded=recorded,
        kept=hf.kept_tensors(opened.iteration, reference),
        dtype=requested_dtype(options.dtype),
        waivers=options.waivers,
    )
    placed = hf.place(plan.drafts, recorded_files, options.max_shard_bytes)
    sides = {name: reference / name for name in hf.side_files(reference)}
    texts: dict[str, bytes] = {}
    if placed.index is not None:
        texts[hf.INDEX] = placed.index.encode()
        sides.pop(hf.INDEX, None)
    elif recorded_files is None:
        sides.pop(hf.INDEX, None)
    original = (reference / hf.CONFIG).read_bytes()
    if (edited := edited_config(original, options.dtype)) != original:
        texts[hf.CONFIG] = edited
        sides.pop(hf.CONFIG, None)
    return Job(
        plan, source, target, opened.iteration, placed.tensors, placed.file_sizes, sides, texts, options, placed
    )


def model_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The model's weights among a checkpoint's tensors: optimizer and random-number state are not weights."""
    other = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(other)}


_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def edited_config(config: bytes, dtype: str | None) -> bytes:
    """`config.json` for tensors stored plainly, cast to `dtype` if one is asked for; nothing else changes."""
    loaded = json.loads(config)
    before = dict(loaded)
    loaded.pop("quantization_config", None)
    if dtype is not None:
        loaded["dtype" if "dtype" in loaded else "torch_dtype"] = _DTYPE_NAMES[dtype]
    if loaded == before:
        return config
    return (json.dumps(loaded, indent=2, ensure_ascii=False) + "\n").encode()


def run(job: Job, progress: Progress = lambda _: None) -> Outcome:
    """Carry a job out; the target appears when all of it is written and flushed, and not before."""
    started = time.monotonic()
    check_free_space(job.target, job.output_bytes)
    source = FileSource(job.source_root)
    try:
        with PartialFolder(job.target) as folder:
            base = folder.path / torch_dist.ITERATION if isinstance(job.placed, torch_dist.Placement) else folder.path
            base.mkdir(exist_ok=True)
            crcs = _stream(job, base, source, progress)
            files = _write_side_files(job, folder.path)
            if job.plan.direction == "hf-to-mcore" and job.plan.ledger.dropped:
                kept = hf.pack_kept([job.plan.sources[name] for name in job.plan.ledger.dropped], source)
                write_synced(base / "hf" / hf.KEPT, kept)
                files[f"{torch_dist.ITERATION}/hf/{hf.KEPT}"] = f"{zlib.crc32(kept):08x}"
            if isinstance(job.placed, torch_dist.Placement):
                torch_dist.write_index(base, job.placed, torch_dist.common_state())
                write_synced(folder.path / torch_dist.TRACKER, b"0")
            manifest = json.dumps(_manifest(job, crcs, files), indent=1, ensure_ascii=False)
            write_synced(folder.path / hf.MANIFEST, manifest.encode())
            folder.commit()
    finally:
        source.close()
    return Outcome(job.target, time.monotonic() - started, job.output_bytes)


def _stream(job: Job, base: Path, source: FileSource, progress: Progress) -> dict[str, list[int]]:
    _check_equal(job, source)
    dtypes = job.placed.archive_dtypes() if isinstance(job.placed, torch_dist.Placement) else {}
    sink = FileSink(base, dict(job.file_sizes), dtypes)
    try:
        if isinstance(job.placed, torch_dist.Placement):
            payload = memoryview(extra_state_archive())
            for file, start, _ in job.placed.objects.values():
                sink.write(file, start, payload)
        else:
            for file, header in job.placed.headers.items():
                sink.write(file, 0, memoryview(header))
        engine = Engine(
            job.plan, job.tensors, source, sink, workers=job.options.workers, max_memory=job.options.max_memory
        )
        crcs = engine.run(progress)
    except BaseException:
        sink.close(sync=False)
        raise
    sink.close(sync=job.options.sync)
    return crcs


def _check_equal(job: Job, source: FileSource) -> None:
    """Tensors that the config declares tied must be: an untied head is never dropped."""
    block = 8 << 20
    for name, other in job.plan.equal:
        a, b = job.plan.sources[name], job.plan.sources[other]
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        left, right = bytearray(block), bytearray(block)
        for at in range(0, a.nbytes if same else 0, block):
            count = min(block, a.nbytes - at)
            for tensor, buffer in ((a, left), (b, right)):
                chunk = tensor.chunks[0]
                source.read_into(chunk.file, source.data_start(chunk) + at, memoryview(buffer)[:count])
            if left[:count] != right[:count]:
                same = False
                break
        if not same:
            raise CoverageError(
                f"`{name}` should repeat `{other}`, and does not",
                hint="config.json says they are tied: set `tie_word_embeddings` to false to keep both",
            )


def _write_side_files(job: Job, root: Path) -> dict[str, str]:
    """Copy side files byte for byte and write generated texts; returns their CRC-32 by name."""
    crcs = {}
    for name, origin in job.side_files.items():
        try:
            data = origin.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read `{origin}`: {error.strerror}") from error
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(root / name, data)
        crcs[name] = f"{zlib.crc32(data):08x}"
    for name, data in job.texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(root / name, data)
        crcs[name] = f"{zlib.crc32(data):08x}"
    return crcs


def _manifest(job: Job, crcs: Mapping[str, list[int]], files: Mapping[str, str]) -> dict[str, Value]:
    plan = job.plan
    prefix = f"{torch_dist.ITERATION}/" if isinstance(job.placed, torch_dist.Placement) else ""
    return {
        "mbx": __version__,
        "direction": plan.direction,
        "table": {"name": plan.table.name, "sha256": plan.table.digest},
        "source": {"path": str(job.source), **job.origin},
        "layout": {"tp": plan.layout.tp, "pp": plan.layout.pp},
        "vocab": {
            "size": plan.config.get("model.vocab_size"),
            "padded": plan.layout.padded_vocab(int(str(plan.config["model.vocab_size"]))),
        },
        "dtype_changes": [[a, b, count] for (a, b), count in plan.dtype_changes.items()],
        "waived": {"missing": list(plan.ledger.waived_missing), "unused": list(plan.ledger.waived_unused)},
        "dropped": list(plan.ledger.dropped),
        "notes": list(plan.notes),
        "files": dict(files),
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "chunks": [
                    [prefix + chunk.file, chunk.start, f"{crc:08x}"]
                    for chunk, crc in zip(tensor.chunks, crcs[name], strict=True)
                ],
            }
            for name, tensor in job.tensors.items()
        },
    }
