"""The legs of parity that run models: forward and loss, of any two sides that one of the two libraries can run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import DifferenceError, MbxError, StorageError, UnsupportedError
from converters.mcore.keys import EMBEDDING, bare, held_as, inner_prefix
from converters.protocols import Source
from converters.rows.config_spelling import DIFFUSERS_CLASS, canonical
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_rope
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mappings import table_names
from mbx.formats.architecture import stated
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import config_file
from mbx.formats.views import ViewSource, mcore_view
from mbx.models.device import Spread
from mbx.models.prompts import Passes, Prompts
from mbx.proof.comparison import Pair
from mbx.proof.gaps import Gap
from mbx.proof.legs import Leg, Status
from mbx.proof.reach import Reach, reach
from mbx.proof.side_files import own_code
from mbx.proof.telling_tokens import telling_tokens
from mbx.proof.told_apart import not_told_apart
from mbx.text import plural

if TYPE_CHECKING:
    from mbx.models.forward.divergence import BorderDiff
    from mbx.models.forward.models import Model


@dataclass(frozen=True, slots=True)
class Asked:
    """The legs that are asked for, of `forward` and `loss`; where they run, on what, and within which limit.

    Without a `tolerance` the limit of logits is a share of their spread. `decoded` says that a checkpoint's weights
    are those that its folder's codes stand for.
    """

    names: tuple[str, ...]
    spread: Spread
    prompts: Prompts
    tolerance: float | None
    decoded: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """The legs that were asked for, the differences behind each layer if compared, and what they did not come to."""

    legs: tuple[Leg, ...] = ()
    borders: tuple[BorderDiff, ...] = ()
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both models, in the order that the user named them, what they read, and what that comes to."""

    models: tuple[Model, Model]
    read: Passes
    vocab: int
    reach: Reach
    notes: tuple[str, ...]


def model_legs(pair: Pair, asked: Asked, mapping: str | None, source: Source) -> Ran:
    """The legs that are asked for; `source` reads the pair's left side.

    All come from the same passes. A model that cannot be run makes legs that did not run. Raises what
    `mbx.models.prompts.passes` raises, and DeviceError.
    """
    names, spread, tolerance = asked.names, asked.spread, asked.tolerance

    def all_legs(status: Status, summary: str, details: tuple[str, ...] = ()) -> Ran:
        return Ran(tuple(Leg(name, status, summary, details) for name in names))

    if not names:
        return Ran()
    sides = _sides(pair, asked, mapping, source)
    if isinstance(sides, Leg):
        return all_legs(sides.status, sides.summary, sides.details)
    from mbx.models.forward.loss import LOSS_TOLERANCE
    from mbx.models.forward.parity import FORWARD_TOLERANCE, compare_models

    limits = {"forward": FORWARD_TOLERANCE, "loss": LOSS_TOLERANCE}
    within = {name: limits[name] if tolerance is None else tolerance for name in names}
    try:
        found = compare_models(
            *sides.models,
            sides.read,
            sides.vocab,
            spread=spread,
            tolerance=within.get("forward"),
            relative=tolerance is None,
            loss_tolerance=within.get("loss"),
            otherwise=sides.reach.otherwise,
        )
    except UnsupportedError as error:
        return all_legs("not run", error.fact, error.details)
    except (StorageError, DifferenceError) as error:
        return all_legs("failed", error.fact, error.details)
    if found is None:
        return all_legs("not run", "rank 0 has the result")
    forward, losses = found.forward, found.losses
    sides.reach.settle(found.felt)
    untold = (*not_told_apart(pair.plan, source), *_around(pair)) if pair.left.spelling != pair.right.spelling else ()
    # A shipped table's rows are told apart by weights drawn for it (`verify ci`, and every table one step from it);
    # its towers are held against checkpoints of the tools that arrange them.
    proved = mapping is None or mapping in table_names()
    legs = []
    if forward is not None:
        status: Status = "passed" if forward.ok else "failed"
        notes = (*sides.notes, *(gap.line for gap in untold if proved))
        details = (*forward.details, *filter(None, (sides.reach.line,)), *notes)
        legs.append(Leg("forward", status, forward.summary, details, forward.figures))
    if losses is not None:
        legs.append(Leg("loss", "passed" if losses.ok else "failed", losses.summary, losses.details))
    elif "loss" in within:
        shape = list(sides.read.batches[0].ids.shape)
        legs.append(Leg("loss", "failed", f"a batch of {shape} tokens predicts nothing: no loss to compare"))
    gaps = (*sides.reach.gaps, *(() if proved else untold))
    return Ran(tuple(legs), forward.borders if forward is not None else (), gaps)


def _sides(pair: Pair, asked: Asked, mapping: str | None, source: Source) -> _Sides | Leg:
    """Both models, or the leg that says why there are none."""
    prompts = asked.prompts
    left, right = (stated(side, mapping) for side in (pair.left, pair.right))
    both = (left, right) if left.config is not None else (right, left)
    hf_config, fields = canonical(dict(both[0].config or {})), pair.plan.config or pair.fields or both[0].fields or {}
    spellings = (pair.left.spelling, pair.right.spelling)
    has_megatron = "mcore" in spellings
    if any(DIFFUSERS_CLASS in side.config for side in both if side.config):
        return Leg("", "not run", "a diffusion transformer: Megatron Core has none, and it gives no logits to compare")
    if has_megatron:
        inexpressible = set(inexpressible_rope(hf_config))
        if others := [note for note in pair.plan.notes if note not in inexpressible]:
            return Leg("", "not run", others[0], tuple(others))
        table = pair.plan.table or both[0].table
        if table is not None and table.unsupported:
            return Leg("", "not run", table.unsupported)
        if "model.vocab_size" not in fields:
            return Leg("", "not run", both[0].why_not or "nothing says which architecture the checkpoint has")
    vocab = fields.get("model.vocab_size", hf_config.get("vocab_size"))
    if not isinstance(vocab, int):
        return Leg("", "not run", f"the vocabulary's size is {vocab!r}; a number was expected")
    for side in (pair.left, pair.right):
        rows = _rows(side)
        if rows is not None and rows < vocab:
            return Leg("", "failed", f"the checkpoint embeds {rows} tokens, the vocabulary has {vocab}")
    reference = _reference(pair)
    from mbx.models.forward.parity import read_prompts

    stated_vocab = {**fields, "model.vocab_size": vocab}
    if prompts.is_drawn:
        telling = telling_tokens(_embedding(pair), source, vocab, hf_config)
        prompts = replace(prompts, telling=tuple(telling))
    seeing = next((side.path for side in (pair.left, pair.right) if side.spelling == "hf"), None)
    read = read_prompts(prompts, stated_vocab, reference or pair.left.path, hf_config, seeing)
    table = pair.plan.table
    heads = sum(name.startswith("mtp.") for name in pair.actual) or _unread_heads(pair)
    found = reach(
        hf_config,
        fields,
        read,
        table,
        heads=heads,
        megatron=has_megatron,
        transformers="hf" in spellings,
        towers=_towers(pair),
    )
    shrunk = _shrunk(table, hf_config, found)
    decoded = ViewSource(mcore_view(pair.left, mapping)) if asked.decoded else None
    models = tuple(
        _model(pair, side, {**fields, **shrunk}, reference, hf_config, found, decoded)
        for side in (pair.left, pair.right)
    )
    # Transformers is the reference where it takes part: its distribution is the one that KL is taken from.
    in_order = models if not pair.swapped or pair.left.spelling != pair.right.spelling else models[::-1]
    return _Sides((in_order[0], in_order[1]), read, vocab, found, tuple(_own_code_notes(pair)))


def _embedding(pair: Pair) -> StoredTensor | None:
    """The embedding of the pair's left side."""
    if pair.left.spelling == "mcore":
        return pair.left.tensors.get(held_as(EMBEDDING, pair.left.tensors))
    unit = next((unit for unit in pair.plan.units if bare(unit.row) == EMBEDDING and unit.moves), None)
    names = [unit.moves[0].source.tensor] if unit is not None else []
    names += [name for name in pair.left.tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))]
    return next((pair.left.tensors[name] for name in names if name in pair.left.tensors), None)


def _unread_heads(pair: Pair) -> int:
    """Tensors of prediction layers of two folders, in layers behind those that the config counts or under `mtp`."""
    layers = pair.left.config.get("num_hidden_layers")
    if pair.left.spelling != "hf" or pair.right.spelling != "hf" or not isinstance(layers, int):
        return 0
    numbered = (re.search(r"\blayers\.(\d+)\.", name) for name in pair.left.tensors)
    return sum(found is not None and int(found[1]) >= layers for found in numbered) + sum(
        re.search(r"(?:^|\.)mtp(?:_layers)?\.", name) is not None for name in pair.left.tensors
    )


def _towers(pair: Pair) -> bool:
    """Whether the model sees or hears, by either side's config."""
    configs = (side.config or {} for side in (pair.left, pair.right))
    return any({"vision_config", "audio_config", "thinker_config"} & config.keys() for config in configs)


def _around(pair: Pair) -> Iterator[Gap]:
    """What a Megatron checkpoint holds around the text model: towers, which Transformers alone runs."""
    prefix = next(filter(None, map(inner_prefix, pair.actual)), "")
    if count := sum(not name.startswith(prefix) for name in pair.actual):
        yield Gap("not reached", f"{plural(count, 'tensor')} around the text model, which Transformers alone runs")


def _shrunk(table: Table | None, hf_config: Mapping[str, Value], found: Reach) -> dict[str, Value]:
    """Megatron Core's fields that the changes of `found` change."""
    if table is None or not found.changes:
        return {}
    try:
        plain, other = (
            table.config.to_mcore(config, allow_unused=tuple(config))
            for config in (hf_config, {**hf_config, **found.changes})
        )
    except MbxError:  # two folders of a model that Megatron Core has not
        return {}
    return {name: value for name, value in other.items() if plain.get(name) != value}


def _own_code_notes(pair: Pair) -> Iterator[str]:
    """Which class ran where a folder's config.json names one of its own."""
    for side, noun in zip((pair.left, pair.right), pair.nouns, strict=True):
        config = config_file(side)
        if own_code(side, config) and (named := (config or {}).get("auto_map")):
            classes = ", ".join(sorted(str(name) for name in named.values())) if isinstance(named, Mapping) else named
            yield f"{noun} names code of its own ({classes}), which is not run: Transformers' own class is compared"


def _model(
    pair: Pair,
    side: Checkpoint,
    fields: Mapping[str, Value],
    reference: Path | None,
    hf_config: Mapping[str, Value],
    found: Reach,
    decoded: ViewSource | None,
) -> Model:
    from mbx.models.forward.models import MegatronModel, TransformersModel
    from mbx.models.transformers.reading import FolderReading

    if side.spelling == "hf":
        settings = found.changed(canonical(dict(side.config)), hf_config)
        return TransformersModel(side.path, FolderReading(settings, _casts(pair) if side is pair.left else {}))
    # Paired with a folder, the checkpoint's tensors are spelt as the table has them.
    tensors = pair.actual if side is pair.right and pair.left.spelling == "hf" else side.tensors
    if decoded is not None:
        tensors = decoded.tensors
    torch_dist = side.format == "torch_dist" and decoded is None
    prefix = next(filter(None, map(inner_prefix, tensors)), "")
    text = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return MegatronModel(fields, side.home, text, torch_dist, reference, hf_config, prefix, decoded)


def _casts(pair: Pair) -> dict[str, tuple[str, int]]:
    """The dtype that each tensor of the folder is stored in on the other side where that is another, and the shift."""
    if pair.right.spelling == "hf":
        return {}
    dtypes = {draft.name: draft.dtype for draft in pair.plan.drafts}
    out = {}
    for unit in pair.plan.units:
        target = dtypes[unit.entries[0].tensor]
        for name in {move.source.tensor for move in unit.moves}:
            if pair.plan.sources[name].dtype != target:
                out[name] = target, unit.shift
    return out


def _rows(side: Checkpoint) -> int | None:
    tensor = side.tensors.get(held_as(EMBEDDING, side.tensors)) if side.spelling == "mcore" else None
    return None if tensor is None else tensor.shape[0]


def _reference(pair: Pair) -> Path | None:
    """A folder with config.json, for rotary frequencies and the tokenizer: a side, or what lies beside it."""
    for side in (pair.left, pair.right):
        beside = side.hf
        if beside is not None and (beside / "config.json").is_file():
            return beside
    return None
