"""Layers of the vocabulary that a run trained whole beside its adapters, on the way to PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.adapters.megatron import TOWER
from converters.adapters.peft_keys import PREFIX, embedding_name, head_name
from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.regions import Move, Region
from converters.errors import CoverageError
from converters.mcore.keys import EMBEDDING, HEAD, TIED
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.pack import Slot
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats.adapter_folder import Adapter, Base
from mbx.formats.registry import sniff


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """A stored layer, the rows of it that are no padding, and its names in Transformers: two where it is tied."""

    stored: StoredTensor
    rows: int
    names: tuple[str, ...]


def stored_whole(adapter: Adapter, base: Base, source: Path) -> tuple[WholeLayer, ...]:
    """What the checkpoint at `source` holds whole, none where its run trained adapters alone.

    CoverageError where a layer that the run's recipe names is not there.
    """
    wanted = adapter.settings.modules_to_save
    if adapter.saved or not wanted:
        return ()
    tensors, vocab = sniff(source).open().tensors, base.fields.get("model.vocab_size")
    assert isinstance(vocab, int)
    found = []
    for weight, names in vocabulary(base.table, base.fields).items():
        if not any(is_named(module, name) for name in names for module in wanted):
            continue
        if weight not in tensors:
            raise CoverageError(f"`{source}` does not hold `{weight}`, which its run trained")
        found.append(WholeLayer(tensors[weight], vocab, names))
    return tuple(found)


def stored_tower(source: Path) -> tuple[WholeLayer, ...]:
    """Factors of a tower's adapters in the checkpoint at `source`, by Transformers' names without PEFT's beginning."""
    found = []
    for name, tensor in sniff(source).open().tensors.items():
        if name.startswith(TOWER) and ".lora_" in name:
            live = name.removeprefix(TOWER).replace(":", ".").replace(".default.", ".")
            found.append(WholeLayer(tensor, tensor.shape[0], (live,)))
    return tuple(found)


def vocabulary(table: Table, fields: Mapping[str, Value]) -> dict[str, tuple[str, ...]]:
    """The embedding and the output layer of a model by Megatron Core's name, with their names in Transformers: one
    layer with two names where the output layer is the embedding."""
    env = environment(fields)
    embedding, head = embedding_name(table, env), head_name(table, env)
    if embedding is None:
        return {}
    if head is None or fields.get(TIED):
        return {EMBEDDING: (embedding, head) if head is not None else (embedding,)}
    return {EMBEDDING: (embedding,), HEAD: (head,)}


def is_named(module: str, weight: str) -> bool:
    """Whether a module's name, or its end, is that of a weight's module."""
    return f".{weight}".endswith(f".{module}.weight")


def with_whole(plan: Plan, layers: Sequence[WholeLayer]) -> Plan:
    """The plan of an adapter with its whole layers, cut to the vocabulary, under each of their names."""
    drafts, units = list(plan.drafts), list(plan.units)
    for layer in layers:
        slot = Slot.whole(layer.rows)
        for name in (PREFIX + name for name in layer.names):
            drafts.append(Draft.whole(name, layer.stored.dtype, (layer.rows, *layer.stored.shape[1:])))
            move = Move(Region(layer.stored.name, (), slot), Region(name, (), slot))
            units.append(Unit(name, (move,), (Entry(name, ()),)))
    ledger = plan.ledger
    return replace(
        plan,
        drafts=tuple(sorted(drafts, key=lambda draft: draft.name)),
        units=tuple(units),
        sources={**plan.sources, **{layer.stored.name: layer.stored for layer in layers}},
        ledger=replace(ledger, consumed=ledger.consumed + len(layers), produced=len(drafts)),
    )


def described_whole(layers: Sequence[WholeLayer]) -> dict[str, Value]:
    """What adapter_config.json says of whole layers. A tied one stays tied where PEFT reads `ensure_weight_tying`;
    where it does not, both names hold the same values."""
    if not layers:
        return {}
    names = [name.removesuffix(".weight").rpartition(".")[2] for layer in layers for name in layer.names]
    tied = any(len(layer.names) > 1 for layer in layers)
    return {"modules_to_save": list(names), **({"ensure_weight_tying": True} if tied else {})}
