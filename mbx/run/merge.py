"""Plans merges: a base model and an adapter of either kind → a model of either kind."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.adapters.merge import Spot, plan_copy, updates_of
from converters.adapters.peft_keys import embedding_name, head_name, names_in_base
from converters.adapters.peft_names import PeftAdapter
from converters.adapters.vocabulary import Merged, adapts_head, joined, merged_model, replaced_rows
from converters.codecs import quantization_of
from converters.codecs.decode import Encoded, decoded_view
from converters.engine.lowrank import LowRank
from converters.engine.regions import matrix
from converters.errors import UnsupportedError, UsageError
from converters.mcore.keys import EMBEDDING, HEAD, TIED
from converters.mcore.layout import Layout
from converters.rows.config_map import environment
from converters.stored import read_rows
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.adapter_folder import Adapter, Base, open_adapter, open_base
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.files import FileSource
from mbx.formats.placement import Order
from mbx.formats.registry import format_named, open_hf, sniff
from mbx.formats.shards import settle_index
from mbx.run.commit import check_target
from mbx.run.config_file import edited_config
from mbx.run.export_codec import PLAIN, SAME
from mbx.run.job import Job, Options, import_job, plan_mcore_to_hf
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.untrusted.small_files import SETTINGS, read_small

KINDS = ("hf", "mcore")
#: Read at once of two tensors that may be one.
_COMPARED_BYTES = 16 << 20


def plan_merge(base: Path, source: Path, target: Path, options: Options, *, to: str | None = None) -> Job:
    """Plan `base + adapter`; headers are read, nothing is written.

    `to` is "hf" or "mcore", the base's own kind by default. Adapted weights are computed in fp32 and rounded once to
    the dtype that the base stores them in; all others move as bytes. Raises CoverageError for adapter tensors that
    match nothing in the base.
    """
    opened = open_base(base, options.mapping, options.allow_unused_keys)
    own = sniff(base).format.spelling
    to = to or own
    if to not in KINDS:
        raise UsageError(f"‹to› {to!r} is not known", hint=f"choices: {', '.join(KINDS)}")
    if to == "hf" and options.layout != Layout():
        raise UsageError(
            "a Hugging Face folder has no parallel layout: ‹tp›, ‹pp› and the like belong to ‹to› mcore",
            hint="add ‹to› mcore, or leave the layout out",
        )
    check_target(target, [base, source], overwrite=options.overwrite)
    folder = open_hf(base).allowing(options.allow_unused_keys) if own == "hf" else None
    plain, encoded = decoded_view(folder.tensors, quantization_of(opened.config)) if folder else ({}, {})
    adapter = open_adapter(source, opened, plain)
    if adapter.settings.modules_to_save and not adapter.saved and sniff(source).format.spelling == "mcore":
        raise UnsupportedError(
            f"`{source}` holds {', '.join(adapter.settings.modules_to_save)} whole beside its adapters",
            hint=f"mbx train export {source.parent} DST ‹merged›; or `mbx convert adapter-to-hf` first",
        )
    if folder is not None:
        model = _Base(folder, _merged(opened, adapter, plain, encoded), encoded)
        if to == "hf":
            return _copied(target, options, opened, adapter, model)
        return _converted(target, options, opened, adapter, model)
    if adapter.saved or ((adapts_head(adapter.adapted) or adapter.as_stored) and opened.fields.get(TIED)):
        what = f"`{sorted(adapter.saved)[0]}`" if adapter.saved else "embedding or output layer, one in this base,"
        raise UnsupportedError(
            f"the adapter replaces {what} by a matrix of its own: only a Hugging Face base takes that",
            hint=f"convert the base first: `mbx convert mcore-to-hf {base} DIR`, then merge into DIR with ‹to› mcore",
        )
    job = plan_mcore_to_hf(base, target, options) if to == "hf" else plan_mcore_to_mcore(base, target, options)
    names = set(job.tensors) if to == "hf" else set()
    return _with_adapter(job, adapter, opened, _vocabulary_there(opened, adapter, names), megatron=to == "mcore")


@dataclass(frozen=True, slots=True)
class _Base:
    """A Hugging Face base, `model` being it with the adapter's whole tensors; `encoded` are stored by a codec."""

    folder: Checkpoint
    model: Merged
    encoded: Mapping[str, Encoded]


def _merged(base: Base, adapter: Adapter, plain: Mapping[str, StoredTensor], encoded: Mapping[str, Encoded]) -> Merged:
    """The base's tensors, decoded, with the adapter's whole ones among them."""
    found = PeftAdapter(adapter.adapted, adapter.saved, adapter.rows, as_stored=adapter.as_stored)
    alike = _one_vocabulary(base, adapter)
    model = merged_model(base.table, base.fields, plain, found, adapter.settings, alike=alike)
    if coded := sorted(name for name in model.origins if name in encoded):
        raise UnsupportedError(
            f"the adapter replaces `{coded[0]}`, which the base stores by the codec {encoded[coded[0]].codec.name}",
            hint="merge it with PEFT itself, into the base in bf16",
        )
    return model


def _one_vocabulary(base: Base, adapter: Adapter) -> bool:
    """Whether the adapter's embedding and head hold the same bytes, as those of a tied model that was resized do."""
    env = environment(base.fields)
    names = embedding_name(base.table, env), head_name(base.table, env)
    pair = [adapter.saved[name] for name in names if name is not None and name in adapter.saved]
    if len(pair) < 2 or adapts_head(adapter.adapted) or adapter.as_stored.keys() & set(names):
        return False
    if (pair[0].dtype, pair[0].shape) != (pair[1].dtype, pair[1].shape):
        return False
    source = FileSource(adapter.root)
    try:
        rows, cols = matrix(pair[0].shape, 0)
        step = max(1, _COMPARED_BYTES // max(1, cols * pair[0].nbytes // max(1, rows * cols)))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            if not (read_rows(pair[0], source, (), row, count) == read_rows(pair[1], source, (), row, count)).all():
                return False
        return True
    finally:
        source.close()


def _vocabulary_there(base: Base, adapter: Adapter, names: Collection[str]) -> dict[str, LowRank]:
    """Updates of the vocabulary in a target made from a Megatron base: under its keys, or `names` of a Hugging Face
    folder. UnsupportedError for those of modules that no row of the text model carries."""
    env, out = environment(base.fields), dict[str, LowRank]()
    own = {embedding_name(base.table, env): EMBEDDING, head_name(base.table, env): HEAD}
    theirs = names_in_base(base.table, env, names)
    tied = bool(base.fields.get(TIED))
    rows = {name: replaced_rows(*said) for name, said in adapter.rows.items()}
    if beside := sorted(adapter.as_stored.keys() - own.keys()):
        raise UnsupportedError(
            f"`{beside[0]}` is adapted, of the model around the text model: only a Hugging Face folder takes that",
            hint="merge without ‹to› mcore, then `mbx convert hf-to-mcore` the merged folder",
            details=beside,
        )
    for name, update in ({**rows, **adapter.as_stored}).items():
        targets = [theirs[name]] if names else [own[name]]
        head = theirs.get(head_name(base.table, env) or "")
        if tied and head is not None and head in names:
            targets.append(head)
        out |= dict.fromkeys(targets, update)
    return out


def _with_adapter(job: Job, adapter: Adapter, base: Base, others: Mapping[str, LowRank], *, megatron: bool) -> Job:
    """The job with the adapter's tensors among its sources, and what they add to its targets."""
    plan = job.plan
    moved = _seen_from(adapter, job.source_root)
    shapes = {name: tensor.shape for name, tensor in job.tensors.items()}
    table, fields = (plan.table, plan.config) if megatron and plan.table is not None else (base.table, base.fields)
    updates = updates_of(table, fields, adapter.adapted, adapter.scales, shapes, megatron=megatron)
    if megatron:
        others = {f"{table.prefix}{name}": update for name, update in others.items()}
    updates = joined(updates, others)
    plan = replace(
        plan,
        direction="merge",
        sources={**plan.sources, **moved},
        updates=updates,
        ledger=replace(plan.ledger, consumed=plan.ledger.consumed + len(moved)),
        notes=(_note(adapter, updates), *adapter.notes, *plan.notes),
    )
    return replace(job, plan=plan, origin={**job.origin, "adapter": str(adapter.path)})


def _converted(target: Path, options: Options, opened: Base, adapter: Adapter, base: _Base) -> Job:
    """A Hugging Face base and its adapter as a Megatron checkpoint."""
    folder, model = base.folder, base.model
    changed = frozenset(model.origins)
    config = edited_config(read_small(folder.home / hf.CONFIG, SETTINGS), None, SAME, model.settings)
    stored = {**folder.tensors, **{name: model.tensors[name] for name in changed}}
    edited = replace(folder, tensors=stored, config=json.loads(config))
    beside: dict[str, bytes | None] = {}
    if changed:
        beside = {hf.CONFIG: config, hf.LAYOUT: hf.record_layout(edited, changed).encode()}
        if stored.keys() != folder.tensors.keys():
            beside[hf.INDEX] = hf.index_of(edited)
    job = import_job(edited, target, options, {}, beside)
    read = _whole(adapter, model, folder.home)
    sources = {name: replace(read[name], name=name) if name in read else t for name, t in job.plan.sources.items()}
    vocabulary = _vocabulary_there(replace(opened, fields=model.fields), adapter, ())
    job = replace(job, plan=replace(job.plan, sources=sources, notes=(*model.notes, *job.plan.notes)))
    return _with_adapter(job, adapter, replace(opened, fields=model.fields), vocabulary, megatron=True)


def _whole(adapter: Adapter, model: Merged, root: Path) -> dict[str, StoredTensor]:
    """What the tensors of a merged model that are not the base's are read from, files named as seen from `root`."""
    moved = _seen_from(adapter, root)
    return {name: moved.get(tensor.name, tensor) for name, tensor in model.origins.items()}


def _note(adapter: Adapter, updates: Mapping[Spot, LowRank]) -> str:
    count = sum(bool(update.parts) for update in updates.values())
    kind = "DoRA" if adapter.settings.dora else "LoRA"
    return f"{count} weights updated in fp32 by the {kind} in `{adapter.path}`, rounded once"


def _seen_from(adapter: Adapter, root: Path) -> dict[str, StoredTensor]:
    """The adapter's tensors, their files named as seen from the folder `root`."""
    far = adapter.root.resolve()
    files = {chunk.file for tensor in adapter.tensors.values() for chunk in tensor.chunks}
    named = {file: os.path.relpath(far / file, root.resolve()) for file in files}
    return {
        name: replace(tensor, chunks=tuple(replace(chunk, file=named[chunk.file]) for chunk in tensor.chunks))
        for name, tensor in adapter.tensors.items()
    }


def _copied(target: Path, options: Options, opened: Base, adapter: Adapter, base: _Base) -> Job:
    """A Hugging Face folder written again under its own names; what a codec stores is written plainly."""
    folder, model, encoded = base.folder, base.model, base.encoded
    source = folder.home
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    updates = updates_of(opened.table, model.fields, adapter.adapted, adapter.scales, shapes, megatron=False)
    moved, origins = _seen_from(adapter, source), _whole(adapter, model, source)
    updates = joined(updates, model.updates)
    plan = plan_copy(opened.table, model.fields, model.tensors, updates, origins)
    notes = [_note(adapter, updates), *adapter.notes, *model.notes, *folder.notes]
    if encoded:
        notes.append("config.json leaves out quantization_config: the weights are stored plainly")
    consumed = len(plan.sources) + sum(tensor.name not in plan.sources for tensor in moved.values())
    sources = {**plan.sources, **moved}
    plan = replace(
        plan, sources=sources, encoded=encoded, notes=tuple(notes), ledger=replace(plan.ledger, consumed=consumed)
    )
    recorded, quantization = hf.recorded_layout(source), quantization_of(opened.config)
    if encoded and recorded is not None and quantization is not None:
        recorded = hf.decoded_layout(recorded, quantization)
    placed = format_named("huggingface", "hf").place(Order(plan, None, recorded, options.max_shard_bytes))
    texts = dict(placed.texts)
    sides = {name: source / name for name in folder.side_files if name not in texts}
    settle_index(placed, sides, texts)
    if encoded:
        sides.pop(hf.QUANT_CONFIG, None)
    if encoded or model.settings:
        config = read_small(source / hf.CONFIG, SETTINGS)
        texts[hf.CONFIG] = edited_config(config, None, PLAIN if encoded else SAME, model.settings)
        del sides[hf.CONFIG]
    origin = {"adapter": str(adapter.path)}
    return Job(plan, source, target, source, sides, texts, options, placed, origin)
