"""Plans merges: a base model and an adapter of either kind → a model of either kind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from converters.adapters.merge import plan_copy, updates_of
from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.errors import UnsupportedError, UsageError
from converters.mcore.layout import Layout
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.adapter_folder import Adapter, Base, open_adapter, open_base
from mbx.formats.placement import Order
from mbx.formats.registry import format_named, open_hf, sniff
from mbx.run.commit import check_target
from mbx.run.export_codec import PLAIN
from mbx.run.job import Job, Options, edited_config, plan_hf_to_mcore, plan_mcore_to_hf
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.untrusted.small_files import SETTINGS, read_small

KINDS = ("hf", "mcore")


def plan_merge(base: Path, source: Path, target: Path, options: Options, *, to: str | None = None) -> Job:
    """Plan `base + adapter`; headers are read, nothing is written.

    `to` is "hf" or "mcore", the base's own kind by default. Adapted weights are computed in fp32 and rounded once to
    the dtype that the base stores them in; all others move as bytes. Raises CoverageError for adapter tensors that
    match nothing in the base.
    """
    opened = open_base(base, options.mapping)
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
    adapter = open_adapter(source, opened)
    if adapter.saved and (own, to) != ("hf", "hf"):
        raise UnsupportedError(
            f"`modules_to_save` holds `{sorted(adapter.saved)[0]}`: only a Hugging Face base takes whole tensors",
            hint="merge with ‹to› hf first, then convert",
        )
    if (own, to) == ("hf", "hf"):
        return _copied(base, target, options, opened, adapter)
    if own == "hf":
        job = plan_hf_to_mcore(base, target, options)
    elif to == "hf":
        job = plan_mcore_to_hf(base, target, options)
    else:
        job = plan_mcore_to_mcore(base, target, options)
    return _with_adapter(job, adapter, opened, megatron=to == "mcore")


def _with_adapter(job: Job, adapter: Adapter, base: Base, *, megatron: bool) -> Job:
    """The job with the adapter's tensors among its sources, and what they add to its targets."""
    plan = job.plan
    moved = _seen_from(adapter, job.source_root)
    shapes = {name: tensor.shape for name, tensor in job.tensors.items()}
    updates = updates_of(base.table, base.fields, adapter.adapted, adapter.scales, shapes, megatron=megatron)
    plan = replace(
        plan,
        direction="merge",
        sources={**plan.sources, **moved},
        updates=updates,
        ledger=replace(plan.ledger, consumed=plan.ledger.consumed + len(moved)),
        notes=(_note(adapter, len(updates)), *plan.notes),
    )
    return replace(job, plan=plan, origin={**job.origin, "adapter": str(adapter.path)})


def _note(adapter: Adapter, count: int) -> str:
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


def _copied(base: Path, target: Path, options: Options, opened: Base, adapter: Adapter) -> Job:
    """A Hugging Face folder written again under its own names; what a codec stores is written plainly."""
    folder = open_hf(base)
    quantization = quantization_of(opened.config)
    sources, encoded = decoded_view(folder.tensors, quantization)
    shapes = {name: tensor.shape for name, tensor in sources.items()}
    updates = updates_of(opened.table, opened.fields, adapter.adapted, adapter.scales, shapes, megatron=False)
    moved = _seen_from(adapter, base)
    replaced = {name: moved[tensor.name] for name, tensor in adapter.saved.items()}
    plan = plan_copy(opened.table, opened.fields, sources, updates, replaced)
    notes = [_note(adapter, len(updates))]
    if replaced:
        notes.append(f"{len(replaced)} tensors taken whole from the adapter: {', '.join(sorted(replaced))}")
    if encoded:
        notes.append("config.json leaves out quantization_config: the weights are stored plainly")
    consumed = len(sources) - len(replaced) + len(moved)
    ledger = replace(plan.ledger, consumed=consumed)
    plan = replace(plan, sources={**plan.sources, **moved}, encoded=encoded, notes=tuple(notes), ledger=ledger)
    recorded = hf.recorded_layout(base)
    if encoded and recorded is not None and quantization is not None:
        recorded = hf.decoded_layout(recorded, quantization)
    placed = format_named("huggingface", "hf").place(Order(plan, None, recorded, options.max_shard_bytes))
    texts = dict(placed.texts)
    sides = {name: folder.home / name for name in folder.side_files if name not in texts}
    if encoded:
        texts[hf.CONFIG] = edited_config(read_small(base / hf.CONFIG, SETTINGS), None, PLAIN)
        del sides[hf.CONFIG]
    origin = {"adapter": str(adapter.path)}
    return Job(plan, base, target, base, sides, texts, options, placed, origin)
