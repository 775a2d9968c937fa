"""A plan's targets in their other form: a GPTModel's tensors as those of a HybridModel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.regions import Move
from converters.mcore.hybrid_form import hybrid_config, to_hybrid
from converters.mcore.keys import parse_key
from converters.mcore.optimizer_state import renamed, weight_of
from converters.mcore.torch_dist import extra_states_of, states_of_model
from converters.rows.coverage import Ledger
from converters.tensors import Shape


def as_hybrid(plan: Plan) -> Plan:
    """`plan`, made for a GPTModel, with targets of the HybridModel that computes the same.

    States of an optimizer go with their weights. UnsupportedError where the model has no such form.
    """
    config = hybrid_config(plan.config)
    drafts = tuple(part for draft in plan.drafts for part in _drafts(draft))
    objects = list(states_of_model("hybrid"))
    for draft in drafts:
        if weight_of(draft.name) == draft.name:
            stack = draft.shape[: parse_key(draft.name).depth]
            for index in product(*map(range, stack)):
                objects += extra_states_of(draft.name, index, stack, "hybrid")
    return replace(
        plan,
        config=config,
        drafts=drafts,
        units=tuple(map(_unit, plan.units)),
        objects=tuple(dict.fromkeys(objects)),
        updates={_place(*place): update for place, update in plan.updates.items()},
        ledger=_counted(plan.ledger, len(drafts)),
    )


def _counted(ledger: Ledger, produced: int) -> Ledger:
    return replace(ledger, produced=produced)


def _place(name: str, index: Shape) -> tuple[str, Shape]:
    """The same for a weight's key and an optimizer's state of it."""
    key, rest = to_hybrid(weight_of(name), index)
    return renamed(name, key), rest


def _drafts(draft: Draft) -> Iterator[Draft]:
    if not parse_key(weight_of(draft.name)).stacked:
        yield replace(draft, name=_place(draft.name, ())[0])
        return
    for layer in range(draft.shape[0]):
        boxes = tuple((rank, at[1:], sizes[1:]) for rank, at, sizes in draft.boxes if at[0] == layer)
        yield Draft(_place(draft.name, (layer,))[0], draft.dtype, draft.shape[1:], boxes)


def _unit(unit: Unit) -> Unit:
    moves = []
    for move in unit.moves:
        name, index = _place(move.target.tensor, move.target.index)
        moves.append(Move(move.source, replace(move.target, tensor=name, index=index)))
    entries = []
    for entry in unit.entries:
        name, index = _place(entry.tensor, entry.index)
        entries.append(Entry(name, index, entry.fold))
    return replace(unit, moves=tuple(moves), entries=tuple(entries))
