"""Plans conversions: open the source, plan, place the target's files. `mbx.run.execution` carries a plan out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.codecs.calibration import Calibration
from converters.codecs.fresh import FRESH
from converters.engine.plan import Plan, requested_dtype
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.mcore.flavours import TEXT_ALONE, in_flavour, usual_of
from converters.mcore.layout import Layout
from converters.planning.calibrated import calibrated
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.planning.folds import changes_of
from converters.planning.importer import plan_import
from converters.rows.coverage import Waivers
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import Architecture, architecture_of, table_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.kept import fitting_kept, not_written
from mbx.formats.placement import Order, Placement
from mbx.formats.registry import format_named, open_hf, open_model
from mbx.formats.shards import settle_index
from mbx.formats.sidecars import Model, Sidecars, megatron_sidecars
from mbx.installed import core_release
from mbx.run.commit import check_target
from mbx.run.config_file import put_config
from mbx.run.execution import Outcome, Progress, run
from mbx.run.export_codec import PLAIN, Codes, codes_of, folds_for, quantised_now
from mbx.run.model_class import form_said, in_form

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
    """How a conversion runs, whatever its direction; `exact_norms` is for trained weights (see `plan_export`).

    `model_class` is the form of a Megatron Core target, `gpt` or `hybrid`; None is the source's, or the installed
    release's. `flavour` is the tool whose arrangement of a model with towers a Megatron Core target has; None is the
    usual one where the format and the class can hold more than the text model. `exclude` are globs of modules that a
    `codec` chosen now leaves as they are, `calibration` is what was measured for one.
    """

    dtype: str | None = None
    exact_norms: bool = False
    layout: Layout = Layout()
    format: str = "torch_dist"
    codec: str = PLAIN
    exclude: tuple[str, ...] = ()
    calibration: Calibration | None = None
    mapping: str | None = None
    waivers: Waivers = Waivers()
    allow_unused_keys: tuple[str, ...] = ()
    overwrite: bool = False
    workers: int = min(8, os.cpu_count() or 1)
    max_memory: int = DEFAULT_MAX_MEMORY
    max_shard_bytes: int = DEFAULT_MAX_SHARD
    sync: bool = True
    resume: bool = False
    model_class: str | None = None
    flavour: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A planned conversion: everything a dry run shows and a run needs.

    `waived_keys` of its config.json were waived by a conversion before this one, which reads none.
    """

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
    waived_keys: tuple[str, ...] = ()

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
    return import_job(open_hf(source).allowing(options.allow_unused_keys), target, options, origin or {})


def import_job(
    folder: Checkpoint,
    target: Path,
    options: Options,
    origin: Mapping[str, str | None],
    beside: Mapping[str, bytes | None] | None = None,
) -> Job:
    """The job of converting an opened Hugging Face folder.

    `beside` are files of the target's hf/ that are not the folder's own, None for those that it shall not have.
    """
    source, config = folder.path, folder.config
    table = table_of(folder, config, options.mapping)
    table = in_flavour(table, _flavour(options, table))
    plan = plan_import(
        table,
        config,
        folder.tensors,
        options.layout,
        dtype=requested_dtype(options.dtype),
        waivers=options.waivers,
    )
    plan = replace(
        plan, notes=(*plan.notes, *folder.notes, *_idle(options, plan, table, config), *left_out_of(folder.home))
    )
    formed = in_form(plan, options.model_class, core_release().model_class, options.format)
    tokenizer = origin.get("repo_id") or str(source.resolve())
    has_tokenizer = any(map(hf.is_tokenizer_file, folder.side_files))
    sidecars = megatron_sidecars(
        formed, options.format, 0, tokenizer=tokenizer if has_tokenizer else None, model=Model(table, config)
    )
    if formed is not plan:
        plan, sidecars = formed, form_said(sidecars, formed)
    placed = format_named(options.format, "mcore").place(Order(plan, sidecars))
    at = f"{sidecars.folder}/"
    sides = {f"{at}hf/{name}": folder.home / name for name in folder.side_files}
    sides |= {f"{at}tokenizer/{name}": folder.home / name for name in folder.side_files if hf.is_tokenizer_file(name)}
    texts = dict(sidecars.texts)
    texts |= {at + name: text for name, text in placed.texts.items()}
    beside = beside or {}
    if hf.LAYOUT not in beside:
        texts[f"{at}hf/{hf.LAYOUT}"] = hf.record_layout(folder).encode()
    if hf.INDEX not in beside and (index := hf.bin_index(folder)) is not None:
        texts[f"{at}hf/{hf.INDEX}"] = index
    for name, text in beside.items():
        sides.pop(f"{at}hf/{name}", None)
        if text is not None:
            texts[f"{at}hf/{name}"] = text
    return Job(plan, source, target, folder.home, sides, texts, options, placed, origin, sidecars)


def _flavour(options: Options, table: Table) -> str:
    """The flavour of a target; UsageError where its format or class holds the text model alone."""
    alone = options.format != "torch_dist" or options.model_class == "hybrid"
    if options.flavour not in (None, TEXT_ALONE) and alone:
        raise UsageError(
            f"‹flavour› {options.flavour} is written as ‹format› torch_dist for a GPTModel only",
            hint=f"‹flavour› {TEXT_ALONE} keeps what stands beside the text model in hf/",
        )
    return options.flavour or (TEXT_ALONE if alone else usual_of(table))


def left_out_of(folder: Path) -> list[str]:
    """What lies in a folder and does not travel, in words."""
    return [f"not carried: `{name}`, {what}" for name, what in hf.not_carried(folder).items()]


def _idle(options: Options, plan: Plan, table: Table, config: Mapping[str, Value]) -> list[str]:
    """Waivers that waived nothing, in words: most likely one is misspelt, or for another model."""
    known = table.config.known_keys()
    idle = [key for key in options.allow_unused_keys if key not in config or key in known]
    keys = [f"‹allow-unused-key› {key} had no effect: config.json has no such unknown key" for key in idle]
    return [*options.waivers.idle(plan.ledger), *keys]


@contextmanager
def _of_config(named: Path | None) -> Iterator[None]:
    """Where tensors and the config that the user named do not fit, ask for that first."""
    try:
        yield
    except CoverageError as error:
        if named is not None:
            asked = f"is `{named}` the config of this very model?"
            error.hint = asked if error.hint is None else f"{asked} Else: {error.hint}"
        raise


def plan_mcore_to_hf(source: Path, target: Path, options: Options, hf_config: Path | None = None) -> Job:
    """Plan a torch_dist → Hugging Face conversion; headers are read, nothing is written.

    `hf_config` is a folder with `config.json` and tokenizer files, needed only where the checkpoint carries none.
    """
    check_target(target, [source, hf_config], overwrite=options.overwrite)
    opened = open_model(source).allowing(options.allow_unused_keys)
    found = architecture_of(opened, options.mapping, hf_config)
    with _of_config(hf_config):
        plan, files, quantization = export_plan(opened, found, options)
    placed = format_named("huggingface", "hf").place(Order(plan, None, files, options.max_shard_bytes))
    sides = dict(found.side_files)
    texts = dict(placed.texts)
    settle_index(placed, sides, texts)
    if not plan.reencoded or quantization is not None:
        sides.pop(hf.QUANT_CONFIG, None)
    put_config(found, plan, options.dtype, options.codec, quantization, sides, texts)
    return Job(plan, source, target, opened.iteration, sides, texts, options, placed)


def export_plan(
    opened: Checkpoint, found: Architecture, options: Options
) -> tuple[Plan, tuple[hf.WeightFile, ...] | None, Mapping[str, Value] | None]:
    """The plan of an export; the weight files that the source had, where that is recorded and what is written has the
    same tensors; and the `quantization_config` of a codec that the source had not."""
    reference, config, table = found.reference, found.config, found.table
    if options.codec in FRESH and table.family == "dit":
        raise UnsupportedError(f"‹codec› {options.codec}: diffusers reads no folder that is quantised so")
    recorded_files = None if reference is None else hf.recorded_layout(reference)
    codes = codes_of(options.codec, config, recorded_files, opened.iteration, reference)
    plain = recorded_files
    if codes.quantization is not None and recorded_files is not None:
        plain = hf.decoded_layout(recorded_files, codes.quantization)
    recorded: dict[str, HfTensor] | None = None
    if plain is not None:
        recorded = {name: tensor for file in plain for name, tensor in file.tensors.items()}
    kept = fitting_kept(opened.iteration, reference, recorded)

    def planned(codes: Codes) -> Plan:
        return plan_export(
            table,
            table.config.to_mcore(config),
            opened.tensors,
            Origin(recorded, {**kept, **codes.beside}, codes.encode, codes.scales),
            dtype=requested_dtype(options.dtype),
            exact_norms=options.exact_norms,
            waivers=options.waivers,
        )

    plan = planned(codes)
    lost = () if recorded is None else not_written(plan, config, recorded, kept)
    if options.exclude and options.codec not in FRESH:
        raise UsageError("‹exclude› is for a ‹codec› that is chosen now", hint=f"one of {', '.join(FRESH)}")
    folds = folds_for(options.codec, options.calibration, table, plan.config, recorded, opened.tensors)
    plain_plan, encoded = plan, None
    if options.codec in FRESH:
        codes = quantised_now(options.codec, codes, plan, options.exclude, options.calibration, folds)
        plan, recorded_files, encoded = planned(codes), None, codes.encode
    measured = options.calibration
    scaled = changes_of(plain_plan, folds, measured, encoded) if measured is not None and folds else {}
    plan = calibrated(plan, scaled, codes.given)
    folded = [f"scales of channels are folded into {len(scaled):,} tensors; the model is the same"] if scaled else []
    left_out = [*lost, *(f"not carried: {what}" for what in opened.left_out)]
    left_out += [] if reference is None else left_out_of(reference)
    idle = _idle(options, plan, table, config)
    kept_codes = []
    if options.dtype is not None and plan.reencoded:
        kinds = ", ".join(sorted({whole.codec.name for whole in plan.reencoded.values()}))
        kept_codes = [f"‹dtype› {options.dtype} casts the other tensors: {len(plan.reencoded):,} stay {kinds}"]
    plan = replace(plan, notes=(*plan.notes, *found.notes, *left_out, *codes.notes, *folded, *kept_codes, *idle))
    return plan, recorded_files if plan.reencoded else plain, codes.written
