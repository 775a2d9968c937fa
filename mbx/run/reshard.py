"""Plans Megatron → Megatron conversions: another layout, another format, the same weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from converters.errors import LayoutError, UnsupportedError, UsageError
from converters.mcore.bridge_config import vocab_divisor_of
from converters.mcore.keys import EMBEDDING, held_as, inner_prefix, parse_key
from converters.mcore.layout import Layout
from converters.mcore.local import Spec
from converters.mcore.torch_dist import stacks_layers
from converters.planning.reshard import plan_reshard
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats.architecture import known_config, stated
from mbx.formats.beside import with_config
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import TEMPLATES
from mbx.formats.optimizer_state import carried_common, carried_states
from mbx.formats.placement import Order
from mbx.formats.registry import format_named, open_model
from mbx.formats.sidecars import Model, megatron_sidecars
from mbx.run.commit import check_target
from mbx.run.job import Job, Options
from mbx.run.model_class import form_said, in_form
from mbx.text import plural
from mbx.untrusted.names import leads_out


def plan_mcore_to_mcore(
    source: Path,
    target: Path,
    options: Options,
    *,
    vocab_divisor: int | None = None,
    spec: Spec = "transformer_engine",
    with_optimizer: bool = False,
) -> Job:
    """Plan a change of layout (`options.layout`) and format (`options.format`); headers are read, nothing is written.

    `vocab_divisor` is make-vocab-size-divisible-by, by default the source's own. `spec` chooses the names of a
    legacy target. `with_optimizer` takes the optimizer's state along, from torch_dist to torch_dist.
    Raises LayoutError where the layout does not fit the model, UnsupportedError for state that no other layout reads.
    """
    check_target(target, [source], overwrite=options.overwrite)
    if options.dtype is not None:
        raise UsageError("a change of layout keeps every value: ‹dtype› belongs to the other conversions")
    if with_optimizer and options.format != "torch_dist":
        raise UsageError(
            f"‹with-optimizer›: only ‹format› torch_dist can take it, got {options.format}",
            hint="leave out one of the two",
        )
    opened = with_config(open_model(source), None)
    states = carried_states(opened, options.layout.ep) if with_optimizer else {}
    if options.format != "torch_dist" and any(map(inner_prefix, opened.tensors)):
        raise UnsupportedError(
            f"this checkpoint holds more than a text model, which ‹format› torch_dist takes only, got {options.format}"
        )
    config, notes = known_config(opened, options.mapping)
    layout, rows = vocabulary(opened, config, options.layout, vocab_divisor)
    plan = plan_reshard(
        {**opened.tensors, **states},
        config,
        layout,
        padded_vocab=rows,
        objects=opened.objects,
        notes=(*notes, *_notes(opened, config, rows, states)),
    )
    formed = in_form(plan, options.model_class, opened.model_class or "gpt", options.format)
    model = stated(opened, options.mapping)
    sidecars = megatron_sidecars(
        formed,
        options.format,
        _iteration(opened),
        origin=opened.args,
        spec=spec,
        tokenizer=tokenizer_of(opened),
        optimizer=carried_common(opened) if with_optimizer else None,
        model=Model(model.table, model.config),
    )
    if formed is not plan:
        plan, sidecars = formed, form_said(sidecars, formed)
    placed = format_named(options.format, "mcore").place(Order(plan, sidecars))
    sides = {f"{sidecars.folder}/{name}": path for name, path in beside(opened.iteration).items()}
    if with_optimizer:  # what `mbx train ‹resume›` continues by
        sides |= {
            f"{sidecars.folder}/{name}": path
            for name in ("mbx_train.json", "recipe.json")
            if (path := opened.iteration / name).is_file() and not leads_out(path)
        }
    texts = {**sidecars.texts, **{f"{sidecars.folder}/{name}": text for name, text in placed.texts.items()}}
    waived = opened.waived_keys
    return Job(plan, source, target, opened.iteration, sides, texts, options, placed, {}, sidecars, waived)


def beside(iteration: Path) -> dict[str, Path]:
    """Files of the model and its tokenizer in an iteration, by name; links out of their folder are left out."""
    folders = [iteration / name for name in ("hf", "tokenizer") if (iteration / name).is_dir()]
    folders += [folder / TEMPLATES for folder in folders if (folder / TEMPLATES).is_dir()]
    return {
        path.relative_to(iteration).as_posix(): path
        for folder in folders
        if folder.name != TEMPLATES or not leads_out(folder)
        for path in sorted(folder.iterdir())
        if path.is_file() and not leads_out(path)
    }


def tokenizer_of(opened: Checkpoint) -> str | None:
    """Where the source's run_config says the tokenizer came from."""
    node = (opened.run_config or {}).get("tokenizer")
    name = node.get("tokenizer_model") if isinstance(node, Mapping) else None
    return name if isinstance(name, str) else None


def _iteration(opened: Checkpoint) -> int:
    """The iteration's number by its folder's name, else by the common state."""
    if match := re.fullmatch(r"iter_(\d+)", opened.iteration.resolve().name):
        return int(match[1])
    number = (opened.common or {}).get("iteration")
    return number if isinstance(number, int) and not isinstance(number, bool) else 0


def vocabulary(
    opened: Checkpoint, config: Mapping[str, Value], layout: Layout, divisor: int | None
) -> tuple[Layout, int | None]:
    """The layout with the divisor that holds, and the embedding's rows under it; None where there is no embedding.

    The source's own divisor holds by default, so that a layout and back gives the same rows.
    """
    embedding = opened.tensors.get(held_as(EMBEDDING, opened.tensors))
    if embedding is None:
        return layout, None
    stored, size = embedding.shape[0], config.get("model.vocab_size")
    if isinstance(size, int) and size > stored:
        raise LayoutError(f"the embedding has {stored} rows, and the config says vocab_size = {size}")
    if divisor is None and opened.args is not None:
        recorded = opened.args.get("make_vocab_size_divisible_by")
        divisor = recorded if isinstance(recorded, int) and recorded > 0 else None
    if divisor is None and opened.run_config is not None:
        divisor = vocab_divisor_of(opened.run_config)
    if divisor is None:
        # Nothing says how the source was padded: its rows stay, up to the next that the ranks can share.
        return layout, replace(layout, vocab_divisor=1).padded_vocab(stored)
    layout = replace(layout, vocab_divisor=divisor)
    return layout, layout.padded_vocab(size if isinstance(size, int) else stored)


def _notes(
    opened: Checkpoint, config: Mapping[str, Value], rows: int | None, states: Mapping[str, StoredTensor]
) -> list[str]:
    notes = []
    if states:
        size = sum(tensor.nbytes for tensor in states.values())
        notes.append(f"carried with the weights: optimizer state, {len(states)} tensors, {size} bytes")
    left = [what for what in opened.left_out if not (states and what.startswith("optimizer state"))]
    notes += [f"not carried: {what}" for what in left]
    notes = notes or ["weights only"]
    embedding = opened.tensors.get(held_as(EMBEDDING, opened.tensors))
    stored = None if embedding is None else embedding.shape[0]
    if rows is not None and stored is not None and rows < stored:
        notes.append(f"{plural(stored - rows, 'padding row')} behind the vocabulary left out: {stored} → {rows}")
    stacked = any(key.stacked and key.site == "decoder" for key in map(parse_key, opened.tensors))
    if config.get("num_layers") and stacked != stacks_layers("gpt", config):
        notes.append("layers stay " + ("stacked" if stacked else "apart") + ", as the source has them")
    return notes
