"""Plans prunings: a model of either kind, of which layers and parts of widths stay → a model of either kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.engine.plan import Draft, Plan, Unit, as_it_is, requested_dtype
from converters.engine.regions import matrix
from converters.errors import UnsupportedError, UsageError
from converters.mcore.layout import Layout
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.planning.join import Joiner
from converters.planning.reshard import plan_reshard
from converters.pruning.choosing import Importance, Pruning, choose
from converters.pruning.fields import pruned_fields, pruned_keys
from converters.pruning.kept import WIDTHS, Kept, in_ranges
from converters.pruning.tensors import Pruned, prune_hf, prune_mcore
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import Architecture, architecture_of, config_text, table_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.kept import fitting_kept
from mbx.formats.placement import Order
from mbx.formats.prediction import lie_beside
from mbx.formats.registry import format_named, open_hf, open_model, sniff
from mbx.formats.shards import place, settle_index
from mbx.formats.sidecars import megatron_sidecars
from mbx.run.commit import check_target
from mbx.run.config_file import edited_config
from mbx.run.export_codec import PLAIN, SAME
from mbx.run.job import Job, Options, import_job
from mbx.run.model_class import form_said, in_form
from mbx.run.reshard import beside, tokenizer_of, vocabulary
from mbx.tables import of_language
from mbx.untrusted.small_files import SETTINGS, read_small

KINDS = ("hf", "mcore")
#: Files of a checkpoint's hf/ that speak of the unpruned model's tensors.
_OF_TENSORS = (hf.CONFIG, hf.LAYOUT, hf.INDEX, hf.KEPT, hf.SCALES, hf.QUANT_CONFIG)


def plan_prune(
    source: Path,
    target: Path,
    pruning: Pruning,
    options: Options,
    *,
    importance: Importance | None = None,
    to: str | None = None,
    hf_config: Path | None = None,
) -> Job:
    """Plan a pruning; headers are read, nothing is written.

    `importance` tells which parts stay where `pruning` says how many. `to` is "hf" or "mcore", the source's own kind
    if not given. `hf_config` is a folder with config.json for a Megatron checkpoint that carries none. What a codec
    stores is written plainly. Raises UsageError for what cannot be left of the model, UnsupportedError for what a
    model of its architecture cannot be without.
    """
    check_target(target, [source, hf_config], overwrite=options.overwrite)
    own = sniff(source).format.spelling
    if own == "peft":
        raise UnsupportedError(
            f"`{source}` is an adapter", hint="merge it into its base, and prune that: `mbx convert merge --help`"
        )
    _check(options, own, to := to or own)
    opened = (open_hf(source) if own == "hf" else open_model(source)).allowing(options.allow_unused_keys)
    found = _architecture(opened, options, hf_config)
    before = found.table.config.to_mcore(found.config)
    kept = choose(pruning, importance, before)
    keys = pruned_keys(found.table, found.config, before, pruned_fields(found.table, before, kept), kept)
    change = _Change(opened, found, before, kept, keys)
    if own == "hf":
        job = _copied(change, target, options) if to == "hf" else _imported(change, target, options)
    else:
        job = _exported(change, target, options) if to == "hf" else _laid_out(change, target, options)
    notes = (*_told(kept, before), *job.plan.notes)
    return replace(job, plan=replace(job.plan, direction="prune", notes=notes))


def _check(options: Options, own: str, to: str) -> None:
    if to not in KINDS:
        raise UsageError(f"‹to› {to!r} is not known", hint=f"choices: {', '.join(KINDS)}")
    if to == "hf" and (options.layout != Layout() or options.format != Options().format or options.model_class):
        raise UsageError(
            "a Hugging Face folder has no parallel layout: ‹tp›, ‹pp›, ‹format› and the like belong to ‹to› mcore",
            hint="add ‹to› mcore, or leave them out",
        )
    if options.codec != PLAIN:
        raise UsageError(
            "a pruning writes plain weights", hint="quantise it on its way out of Megatron, once it is trained"
        )
    if options.dtype is not None and own == to:
        raise UsageError("‹dtype› belongs to a change of kind: a pruned tensor keeps its own")


def _architecture(opened: Checkpoint, options: Options, hf_config: Path | None) -> Architecture:
    """What model a checkpoint of either kind is of; UnsupportedError where that is more than a text model."""
    if opened.spelling == "hf":
        table = table_of(opened, opened.config, options.mapping)
        files = {name: opened.home / name for name in opened.side_files}
        found = Architecture(opened.config, table, opened.home, opened.notes, files)
    else:
        found = architecture_of(opened, options.mapping, hf_config)
    of_language(found.table)
    if found.table.towers or found.table.kept:
        raise UnsupportedError(
            f"a model of `{found.table.name}` has more than a text model, whose widths and layers the rest is made for"
        )
    if opened.spelling == "mcore" and found.reference is not None:
        kept = hf.kept_tensors(opened.iteration, found.reference)
        if lie_beside(found.table, found.table.config.to_mcore(found.config), kept, opened.tensors):
            raise UnsupportedError(
                f"the prediction layers of `{opened.path}` lie beside it, as a run left them out",
                hint="prune the Hugging Face folder that `mbx convert mcore-to-hf` makes of it, which has them",
            )
    return found


@dataclass(frozen=True, slots=True)
class _Change:
    """An opened checkpoint, what model it is of with which Megatron Core fields, what of it stays, and the keys of its
    config.json that change."""

    opened: Checkpoint
    found: Architecture
    before: Mapping[str, Value]
    kept: Kept
    keys: Mapping[str, Value]

    @property
    def config(self) -> dict[str, Value]:
        """The pruned model's config.json; its weights are stored plainly."""
        config = {**self.found.config, **self.keys}
        config.pop("quantization_config", None)
        return config

    @property
    def after(self) -> dict[str, Value]:
        """Megatron Core fields of the pruned model."""
        return self.found.table.config.to_mcore(self.config)

    def text(self, dtypes: list[str], dtype: str | None = None) -> bytes:
        """config.json of the pruned model, which is the source's but for what changes."""
        found = self.found
        if found.reference is None:
            return edited_config(config_text(self.config, dtypes), dtype, SAME)
        original = read_small(found.reference / hf.CONFIG, SETTINGS)
        codec = SAME if quantization_of(found.config) is None else PLAIN
        return edited_config(original, dtype, codec, self.keys)

    def joiners(self) -> tuple[Joiner, Joiner]:
        """The joiners of the model before and after."""
        table = self.found.table
        return Joiner.at(table, self.before), Joiner.at(table, self.after)

    def stored_as_hf(self, options: Options) -> Pruned:
        """The pruned tensors of a Hugging Face folder."""
        folder = self.opened
        plain, encoded = decoded_view(folder.tensors, quantization_of(folder.config))
        return prune_hf(*self.joiners(), self.kept, plain, encoded, options.waivers)

    def folder(self) -> dict[str, HfTensor] | None:
        """Tensors that a checkpoint's model had as a folder, decoded; None where nothing says them."""
        found = self.found
        files = None if found.reference is None else hf.recorded_layout(found.reference)
        if files is not None and (quantization := quantization_of(found.config)) is not None:
            files = hf.decoded_layout(files, quantization)
        return None if files is None else {n: tensor for file in files for n, tensor in file.tensors.items()}

    def recorded(self) -> Pruned | None:
        """The pruned tensors that a checkpoint's model had as a folder, values aside; None where nothing says them."""
        if (known := self.folder()) is None:
            return None
        tensors = {name: StoredTensor(name, one.dtype, one.shape, ()) for name, one in known.items()}
        return prune_hf(*self.joiners(), self.kept, tensors, {})


def _told(kept: Kept, fields: Mapping[str, Value]) -> list[str]:
    """What stays, in words."""
    out = []
    if len(kept.layers) != fields["num_layers"]:
        out.append(f"layers {in_ranges(kept.layers)} of {fields['num_layers']} stay, numbered anew")
    widths = [f"‹{WIDTHS[width]}› {fields[width]} → {kept.size(width)}" for width in kept.widths]
    return out + ([", ".join(widths)] if widths else [])


def _copied(change: _Change, target: Path, options: Options) -> Job:
    """A Hugging Face folder of a Hugging Face folder."""
    folder, table, pruned = change.opened, change.found.table, change.stored_as_hf(options)
    drafts = [Draft.whole(tensor.name, tensor.dtype, tensor.shape) for tensor in pruned.tensors.values()]
    units = [unit for tensor in pruned.tensors.values() for unit in _carried(tensor, pruned)]
    plan = Plan.of_all("prune", change.after, pruned.tensors, drafts, units, table=table)
    plan = replace(pruned.applied(plan), notes=folder.notes)
    placed = format_named("huggingface", "hf").place(Order(plan, None, None, options.max_shard_bytes))
    texts = {**placed.texts, hf.CONFIG: change.text([])}
    sides = {name: path for name, path in change.found.side_files.items() if name not in texts}
    settle_index(placed, sides, texts)
    if pruned.encoded:
        sides.pop(hf.QUANT_CONFIG, None)
    return Job(plan, folder.path, target, folder.home, sides, texts, options, placed)


def _carried(tensor: StoredTensor, pruned: Pruned) -> list[Unit]:
    """What carries a tensor over: entry by entry where its entries are chosen apart."""
    choice = pruned.selected.get(tensor.name)
    depth = 0 if choice is None else len(next(iter(choice.entries)))
    return as_it_is(tensor.name, tensor.name, tensor.shape[:depth], matrix(tensor.shape, depth)[0])


def _imported(change: _Change, target: Path, options: Options) -> Job:
    """A Megatron checkpoint of a Hugging Face folder."""
    pruned = change.stored_as_hf(options)
    edited = replace(change.opened, tensors=pruned.tensors, config=change.config)
    files: dict[str, bytes | None] = {hf.CONFIG: change.text([]), hf.QUANT_CONFIG: None, hf.INDEX: None}
    files |= _layout(pruned, options)
    if not pruned.encoded:
        del files[hf.QUANT_CONFIG]
    job = import_job(edited, target, options, {}, files)
    return replace(job, plan=pruned.applied(job.plan))


def _layout(pruned: Pruned, options: Options) -> dict[str, bytes]:
    """What says which files the pruned model has as a Hugging Face folder: its layout, and the index of several."""
    drafts = [Draft.whole(tensor.name, tensor.dtype, tensor.shape) for tensor in pruned.tensors.values()]
    placed = place(drafts, None, options.max_shard_bytes)
    files = [{"file": name, "header": header[8:].decode()} for name, header in placed.headers.items()]
    return {hf.LAYOUT: json.dumps({"files": files}).encode(), **placed.texts}


def _exported(change: _Change, target: Path, options: Options) -> Job:
    """A Hugging Face folder of a Megatron checkpoint."""
    recorded, opened, found = change.recorded(), change.opened, change.found
    pruned = prune_mcore(*change.joiners(), change.kept, opened.tensors)
    origin = Origin()
    if recorded is not None and found.reference is not None:
        kept = fitting_kept(opened.iteration, found.reference, change.folder())
        origin = Origin(
            {name: HfTensor(tensor.dtype, tensor.shape) for name, tensor in recorded.tensors.items()},
            {
                name: replace(kept[old], name=name)
                for name, old in recorded.origins.items()
                if old in kept and name not in recorded.selected
            },
        )
    plan = plan_export(
        found.table,
        change.after,
        pruned.tensors,
        origin,
        dtype=requested_dtype(options.dtype),
        exact_norms=options.exact_norms,
        waivers=options.waivers,
    )
    left = tuple(f"not carried: {what}" for what in opened.left_out)
    plan = replace(pruned.applied(plan), notes=(*plan.notes, *found.notes, *left))
    placed = format_named("huggingface", "hf").place(Order(plan, None, None, options.max_shard_bytes))
    texts = {**placed.texts, hf.CONFIG: change.text([draft.dtype for draft in plan.drafts], options.dtype)}
    sides = {name: path for name, path in found.side_files.items() if name not in (*texts, hf.QUANT_CONFIG)}
    settle_index(placed, sides, texts)
    return Job(plan, opened.path, target, opened.iteration, sides, texts, options, placed)


def _laid_out(change: _Change, target: Path, options: Options) -> Job:
    """A Megatron checkpoint of a Megatron checkpoint; the pruned model begins at iteration 0."""
    recorded, opened, found = change.recorded(), change.opened, change.found
    pruned = prune_mcore(*change.joiners(), change.kept, opened.tensors)
    layout, rows = vocabulary(opened, change.after, options.layout, None)
    plan = plan_reshard(pruned.tensors, change.after, layout, padded_vocab=rows)
    left = tuple(f"not carried: {what}" for what in opened.left_out)
    plan = replace(pruned.applied(plan), table=found.table, notes=(*found.notes, *left))
    formed = in_form(plan, options.model_class, opened.model_class or "gpt", options.format)
    sidecars = megatron_sidecars(formed, options.format, 0, tokenizer=tokenizer_of(opened))
    if formed is not plan:
        plan, sidecars = formed, form_said(sidecars, formed)
    placed = format_named(options.format, "mcore").place(Order(plan, sidecars))
    at = f"{sidecars.folder}/"
    stale = {f"hf/{name}" for name in _OF_TENSORS}
    sides = {at + name: path for name, path in beside(opened.iteration).items() if name not in stale}
    sides |= {f"{at}hf/{n}": path for n, path in found.side_files.items() if n not in _OF_TENSORS}
    made = {hf.CONFIG: change.text([draft.dtype for draft in plan.drafts])}
    made |= {} if recorded is None else _layout(recorded, options)
    texts = {**sidecars.texts, **{at + name: text for name, text in placed.texts.items()}}
    texts |= {f"{at}hf/{name}": text for name, text in made.items()}
    return Job(plan, opened.path, target, opened.iteration, sides, texts, options, placed, {}, sidecars)
