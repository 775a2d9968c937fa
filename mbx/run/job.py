"""Plans conversions: open the source, plan, place the target's files. `mbx.run.execution` carries a plan out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.engine.plan import Plan, requested_dtype
from converters.mcore.layout import Layout
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.planning.importer import plan_import
from converters.rows.coverage import Waivers
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import Architecture, architecture_of, config_text
from mbx.formats.placement import Order, Placement
from mbx.formats.registry import format_named, open_hf, open_model
from mbx.formats.sidecars import Sidecars, megatron_sidecars
from mbx.run.commit import check_target
from mbx.run.execution import Outcome, Progress, run
from mbx.run.export_codec import PLAIN, codes_of
from mbx.tables import table_for
from mbx.untrusted.small_files import SETTINGS, read_small

DEFAULT_MAX_MEMORY = 1 << 30
DEFAULT_MAX_SHARD = 5 * 10**9

__all__ = [
    "DEFAULT_MAX_MEMORY",
    "DEFAULT_MAX_SHARD",
    "Job",
    "Options",
    "Outcome",
    "Progress",
    "plan_hf_to_mcore",
    "plan_mcore_to_hf",
    "run",
]


@dataclass(frozen=True, slots=True)
class Options:
    """How a conversion runs, whatever its direction; `exact_norms` is for trained weights (see `plan_export`)."""

    dtype: str | None = None
    exact_norms: bool = False
    layout: Layout = Layout()
    format: str = "torch_dist"
    codec: str = PLAIN
    mapping: str | None = None
    waivers: Waivers = Waivers()
    allow_unused_keys: tuple[str, ...] = ()
    overwrite: bool = False
    workers: int = min(8, os.cpu_count() or 1)
    max_memory: int = DEFAULT_MAX_MEMORY
    max_shard_bytes: int = DEFAULT_MAX_SHARD
    sync: bool = True
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A planned conversion: everything a dry run shows and a run needs."""

    plan: Plan
    source: Path
    target: Path
    source_root: Path
    side_files: Mapping[str, Path]
    texts: Mapping[str, bytes]
    options: Options
    placed: Placement
    origin: Mapping[str, str | None] = field(default_factory=dict)
    sidecars: Sidecars | None = None

    def run(self, progress: Progress = lambda _: None) -> Outcome:
        """Carry the job out, as this machine's only process; `progress` is called with bytes as they are written."""
        return run(self, progress)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The target's tensors, each chunk in its place."""
        return self.placed.tensors

    @property
    def file_sizes(self) -> Mapping[str, int]:
        """Bytes of each of the target's weight files."""
        return self.placed.file_sizes

    @property
    def base(self) -> str:
        """The folder of the weights within the target, with a slash behind it; empty where they lie at the top."""
        return "" if self.sidecars is None else f"{self.sidecars.folder}/"

    @property
    def output_bytes(self) -> int:
        """Bytes the target will occupy, containers and copied files included, but for the index and the manifest."""
        beside = sum(map(hf.packed_bytes, self.packed.values()))
        beside += sum(path.stat().st_size for path in self.side_files.values())
        return sum(self.file_sizes.values()) + sum(map(len, self.texts.values())) + beside

    @property
    def packed(self) -> dict[str, tuple[StoredTensor, ...]]:
        """Files of source tensors that travel beside the Megatron Core ones, by their path within the target."""
        kept = tuple(self.plan.sources[name] for name in self.plan.kept)
        files = {hf.KEPT: kept, hf.SCALES: tuple(self.plan.carried)}
        return {f"{self.base}hf/{name}": tensors for name, tensors in files.items() if tensors}


def plan_hf_to_mcore(
    source: Path, target: Path, options: Options, origin: Mapping[str, str | None] | None = None
) -> Job:
    """Plan a Hugging Face folder → torch_dist conversion; headers are read, nothing is written."""
    check_target(target, [source], overwrite=options.overwrite)
    folder = open_hf(source)
    config = folder.config
    table = table_for(config, options.mapping)
    plan = plan_import(
        table,
        config,
        folder.tensors,
        options.layout,
        dtype=requested_dtype(options.dtype),
        waivers=options.waivers,
        allow_unused_keys=options.allow_unused_keys,
    )
    plan = replace(plan, notes=(*plan.notes, *_idle(options, plan, table, config), *left_out_of(folder.home)))
    tokenizer = (origin or {}).get("repo_id") or str(source.resolve())
    has_tokenizer = any(map(hf.is_tokenizer_file, folder.side_files))
    sidecars = megatron_sidecars(plan, options.format, 0, tokenizer=tokenizer if has_tokenizer else None)
    placed = format_named(options.format, "mcore").place(Order(plan, sidecars))
    at = f"{sidecars.folder}/"
    sides = {f"{at}hf/{name}": folder.home / name for name in folder.side_files}
    sides |= {f"{at}tokenizer/{name}": folder.home / name for name in folder.side_files if hf.is_tokenizer_file(name)}
    texts = {f"{at}hf/{hf.LAYOUT}": hf.record_layout(folder).encode(), **sidecars.texts}
    texts |= {at + name: text for name, text in placed.texts.items()}
    if (index := hf.bin_index(folder)) is not None:
        texts[f"{at}hf/{hf.INDEX}"] = index
    return Job(plan, source, target, folder.home, sides, texts, options, placed, origin or {}, sidecars)


def left_out_of(folder: Path) -> list[str]:
    """What lies in a folder and does not travel, in words."""
    return [f"not carried: `{name}`, {what}" for name, what in hf.not_carried(folder).items()]


def _idle(options: Options, plan: Plan, table: Table, config: Mapping[str, Value]) -> list[str]:
    """Waivers that waived nothing, in words: most likely one is misspelt, or for another model."""
    known = table.config.known_keys()
    idle = [key for key in options.allow_unused_keys if key not in config or key in known]
    keys = [f"‹allow-unused-key› {key} had no effect: config.json has no such unknown key" for key in idle]
    return [*options.waivers.idle(plan.ledger), *keys]


def plan_mcore_to_hf(source: Path, target: Path, options: Options, hf_config: Path | None = None) -> Job:
    """Plan a torch_dist → Hugging Face conversion; headers are read, nothing is written.

    `hf_config` is a folder with `config.json` and tokenizer files, needed only where the checkpoint carries none.
    """
    check_target(target, [source, hf_config], overwrite=options.overwrite)
    opened = open_model(source)
    found = architecture_of(opened, options.mapping, hf_config, allow_unused_keys=options.allow_unused_keys)
    reference, config, table = found.reference, found.config, found.table
    recorded_files = None if reference is None else hf.recorded_layout(reference)
    codes = codes_of(options.codec, config, recorded_files, opened.iteration, reference)
    plain = recorded_files
    if codes.quantization is not None and recorded_files is not None:
        plain = hf.decoded_layout(recorded_files, codes.quantization)
    recorded: dict[str, HfTensor] | None = None
    if plain is not None:
        recorded = {name: tensor for file in plain for name, tensor in file.tensors.items()}
    kept = {} if reference is None else hf.kept_tensors(opened.iteration, reference)
    plan = plan_export(
        table,
        table.config.to_mcore(config, allow_unused=options.allow_unused_keys),
        opened.tensors,
        Origin(recorded, {**kept, **codes.beside}, codes.encode, codes.scales),
        dtype=requested_dtype(options.dtype),
        exact_norms=options.exact_norms,
        waivers=options.waivers,
    )
    left_out = [f"not carried: {what}" for what in opened.left_out]
    left_out += [] if reference is None else left_out_of(reference)
    idle = _idle(options, plan, table, config)
    kept_codes = []
    if options.dtype is not None and plan.reencoded:
        kinds = ", ".join(sorted({whole.codec.name for whole in plan.reencoded.values()}))
        kept_codes = [f"‹dtype› {options.dtype} casts the other tensors: {len(plan.reencoded):,} stay {kinds}"]
    plan = replace(plan, notes=(*plan.notes, *found.notes, *left_out, *codes.notes, *kept_codes, *idle))
    files = recorded_files if plan.reencoded else plain
    placed = format_named("huggingface", "hf").place(Order(plan, None, files, options.max_shard_bytes))
    sides = {} if reference is None else {name: reference / name for name in hf.side_files(reference)}
    texts = dict(placed.texts)
    if recorded_files is None or hf.INDEX in texts:
        sides.pop(hf.INDEX, None)
    _config_file(found, plan, options, sides, texts)
    return Job(plan, source, target, opened.iteration, sides, texts, options, placed)


def _config_file(
    found: Architecture, plan: Plan, options: Options, sides: dict[str, Path], texts: dict[str, bytes]
) -> None:
    """Put the target's config.json among the copied files, or among the made ones where it changes."""
    if found.reference is None:
        texts[hf.CONFIG] = config_text(found.config, [draft.dtype for draft in plan.drafts])
        return
    original = read_small(found.reference / hf.CONFIG, SETTINGS)
    if (edited := edited_config(original, options.dtype, options.codec)) != original:
        texts[hf.CONFIG] = edited
        sides.pop(hf.CONFIG, None)


_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def edited_config(config: bytes, dtype: str | None, codec: str) -> bytes:
    """`config.json` for tensors stored by `codec`, cast to `dtype` if one is asked for; nothing else changes."""
    loaded = json.loads(config)
    before = dict(loaded)
    if codec == PLAIN and loaded.get("quantization_config") is not None:
        del loaded["quantization_config"]
    if dtype is not None:
        loaded["dtype" if "dtype" in loaded else "torch_dtype"] = _DTYPE_NAMES[dtype]
    if loaded == before:
        return config
    return (json.dumps(loaded, indent=2, ensure_ascii=False) + "\n").encode()
