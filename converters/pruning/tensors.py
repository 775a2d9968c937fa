"""The tensors of a pruned model, under either side's names: each the whole, or a choice, of what the model stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from converters.codecs.decode import Encoded
from converters.engine.plan import Plan, Unit
from converters.engine.regions import Move
from converters.engine.selected import Picked, Selected
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.mcore.keys import bare
from converters.planning.join import Joined, Joiner, Place
from converters.pruning.axes import Axes, axes_of
from converters.pruning.fields import twins_of
from converters.pruning.kept import WIDTHS, Kept
from converters.rows.coverage import NO_WAIVERS, Waivers, settle
from converters.rows.pack import Rows, slot_rows
from converters.rows.table import Row
from converters.tensors import Shape, StoredTensor

#: What a tensor of the unpruned model is called among a plan's sources, whose own names are the pruned model's.
_BEFORE = "unpruned "


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned model's tensors by name, those of them that are a choice, and what these are chosen from.

    `origins` says where each tensor's (first) entry was, `encoded` which are stored by a codec; of those `left_out`
    nothing stays.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    selected: dict[str, Selected] = field(default_factory=dict)
    sources: dict[str, StoredTensor] = field(default_factory=dict)
    encoded: dict[str, Encoded] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def applied(self, plan: Plan) -> Plan:
        """`plan`, whose sources are `tensors`, reading what the unpruned model stored.

        Entries that stay as they are are read where they lie; so are tensors that have to hold the same.
        """
        units = tuple(self._located(unit) for unit in plan.units)
        used = {move.source.tensor for unit in units for move in unit.moves}
        chosen = {name: choice for name, choice in self.selected.items() if name in used}
        taken = used | {picked.tensor for choice in chosen.values() for picked in choice.entries.values()}
        equal = tuple((self._before(a), self._before(b)) for a, b in plan.equal)
        taken |= {name for pair in equal for name in pair}
        encoded = {name: whole for name, whole in self.encoded.items() if name in taken}
        decoded = Counter((whole.codec.name, whole.tensor.dtype) for whole in encoded.values())
        sources = {name: tensor for name, tensor in plan.sources.items() if name not in self.selected or name in used}
        return replace(
            plan,
            units=units,
            sources=sources | {name: tensor for name, tensor in self.sources.items() if name in taken},
            selected=chosen,
            encoded=encoded,
            dtype_changes=Counter(plan.dtype_changes) + decoded,
            equal=equal,
            ledger=replace(
                plan.ledger,
                consumed=plan.ledger.consumed + len(self.left_out),
                dropped=(*plan.ledger.dropped, *self.left_out),
            ),
            kept=tuple(name for name in plan.kept if name not in self.selected),
        )

    def _located(self, unit: Unit) -> Unit:
        return replace(
            unit,
            moves=tuple(map(self._read_where_it_lies, unit.moves)),
            original=None if unit.original in self.selected else unit.original,
        )

    def _read_where_it_lies(self, move: Move) -> Move:
        choice = self.selected.get(move.source.tensor)
        if choice is None or not (picked := choice.entries[move.source.index]).whole:
            return move
        return replace(move, source=replace(move.source, tensor=picked.tensor, index=picked.index))

    def _before(self, name: str) -> str:
        choice = self.selected.get(name)
        return name if choice is None else choice.entries[()].tensor


def prune_hf(
    before: Joiner,
    after: Joiner,
    kept: Kept,
    tensors: Mapping[str, StoredTensor],
    encoded: Mapping[str, Encoded],
    waivers: Waivers = NO_WAIVERS,
) -> Pruned:
    """Hugging Face tensors, decoded, of what `kept` leaves of the model of `before`; `after` is the pruned one's.

    Raises CoverageError for tensors that no row has, UnsupportedError for a parameter whose widths are not known.
    """
    rows = [row for row in before.table.expand(before.env, tensors) if all(name in tensors for name in row.hf)]
    settle(before.table.name, "source", tensors, (name for row in rows for name in row.hf), waivers)
    made, choice = _Making(tensors, encoded), _Choice(before, kept)
    for row, moved in _staying(rows, before, kept):
        if row.spec.drop:
            for old, new in zip(row.hf, moved.hf, strict=True):
                made.add(new, (), (), Picked(old, ()))
            continue
        joined = before.from_hf(row, [tensors[name] for name in row.hf])
        chosen = choice.of(joined.hf, joined)
        for place, name, (rows_kept, cols_kept) in zip(joined.hf, moved.hf, chosen, strict=True):
            index: Shape = ()
            stack: Shape = ()
            if place.index and moved.expert is not None:
                index, stack = (moved.expert,), (after.experts,)
            made.add(name, index, stack, Picked(place.tensor, place.index, rows_kept, cols_kept))
    return made.pruned()


def prune_mcore(before: Joiner, after: Joiner, kept: Kept, tensors: Mapping[str, StoredTensor]) -> Pruned:
    """The same of Megatron Core's tensors, under its canonical keys."""
    rows = [row for row in before.table.expand(before.env, None, tensors) if not row.spec.drop and row.same_as is None]
    homes = {row.mcore: before.homes(row, tensors) for row in rows}
    keys = [home.key for places in homes.values() for home in places]
    settle(before.table.name, "checkpoint", tensors, keys, NO_WAIVERS)
    made, choice = _Making(tensors, {}), _Choice(before, kept)
    for row, moved in _staying(rows, before, kept):
        own = homes[row.mcore]
        joined = before.from_mcore(row, own, [tensors[home.key] for home in own])
        places = zip(joined.mcore, after.homes(moved), choice.of(joined.mcore, joined), strict=True)
        for place, home, (rows_kept, cols_kept) in places:
            made.add(home.key, home.index, home.stack, Picked(place.tensor, place.index, rows_kept, cols_kept))
    return made.pruned()


@dataclass(slots=True)
class _Making:
    """Collects entries of a pruned model's tensors."""

    stored: Mapping[str, StoredTensor]
    encoded: Mapping[str, Encoded]
    entries: dict[str, dict[Shape, Picked]] = field(default_factory=dict)
    stacks: dict[str, Shape] = field(default_factory=dict)

    def add(self, name: str, index: Shape, stack: Shape, picked: Picked) -> None:
        self.stacks[name] = stack
        self.entries.setdefault(name, {})[index] = picked

    def pruned(self) -> Pruned:
        used = {picked.tensor for entries in self.entries.values() for picked in entries.values()}
        out = Pruned(left_out=[name for name in self.stored if name not in used])
        for name, entries in self.entries.items():
            self._add(out, name, entries)
        return out

    def _add(self, out: Pruned, name: str, entries: Mapping[Shape, Picked]) -> None:
        first = next(iter(entries.values()))
        origin, stack = self.stored[first.tensor], self.stacks[name]
        out.origins[name] = first.tensor
        if len(dtypes := {self.stored[picked.tensor].dtype for picked in entries.values()}) > 1:
            raise CoverageError(f"`{name}` would be of {', '.join(sorted(dtypes))} at once")
        alike = all(p.whole and p.tensor == first.tensor and p.index == index for index, p in entries.items())
        if alike and origin.shape[: len(stack)] == stack:  # the tensor as it is, under its new name
            out.tensors[name] = replace(origin, name=name)
            if first.tensor in self.encoded:
                out.encoded[name] = replace(self.encoded[first.tensor], tensor=out.tensors[name])
            return
        inner = list(origin.shape[len(first.index) :])
        for dim, chosen in enumerate((first.rows, first.cols)):
            if chosen is not None:
                inner[dim] = len(chosen)
        out.tensors[name] = StoredTensor(name, origin.dtype, (*stack, *inner), ())
        moved = {index: replace(picked, tensor=_BEFORE + picked.tensor) for index, picked in entries.items()}
        out.selected[name] = Selected(out.tensors[name], moved)
        for picked in entries.values():
            out.sources[_BEFORE + picked.tensor] = self.stored[picked.tensor]
            if picked.tensor in self.encoded:
                out.encoded[_BEFORE + picked.tensor] = self.encoded[picked.tensor]


def _staying(rows: Collection[Row], before: Joiner, kept: Kept) -> Iterator[tuple[Row, Row]]:
    """Rows of what stays, and the same rows as the pruned model numbers them."""
    for row in rows:
        ahead = bare(row.site).startswith("mtp.")
        if ahead and not kept.ahead:
            continue
        if ahead and kept.widths:
            raise UnsupportedError(
                f"`{row.mcore}` belongs to a prediction layer, whose importance nothing measures",
                hint="‹drop-mtp› leaves prediction layers out; pruning whole layers keeps them",
            )
        if row.layer is not None and not ahead and row.layer not in kept.layers:
            continue
        layer, expert = row.layer, row.expert
        if layer is not None:
            fewer = before.layers - len(kept.layers)
            layer = kept.number(layer) if not ahead else layer - fewer if layer >= before.layers else layer
        if expert is not None and (chosen := kept.of("num_moe_experts", row.layer)) is not None:
            at = int(np.searchsorted(chosen, expert))
            if at == len(chosen) or chosen[at] != expert:
                continue
            expert = at
        yield row, _renumbered(row, layer, row.index if ahead else layer, expert)


def _renumbered(row: Row, layer: int | None, index: int | None, expert: int | None) -> Row:
    """A row at another layer and expert."""

    def filled(name: str, at: Row) -> str:
        return name.replace("{L}", str(at.layer)).replace("{I}", str(at.index)).replace("{E}", str(at.expert))

    moved = replace(row, layer=layer, index=index, expert=expert)
    names = []
    for template, name in zip(row.spec.hf, row.hf, strict=True):
        own = filled(template, row)
        # a name that the table spells in another way, as it may those outside of blocks, stays but for its layer
        prefix, end = (name.removesuffix(own), filled(template, moved)) if name.endswith(own) else (name, "")
        if layer != row.layer:
            prefix = re.sub(rf"(?<=\.){row.layer}(?=\.)", str(layer), prefix, count=1)
        names.append(prefix + end)
    return replace(moved, hf=tuple(names))


@dataclass(slots=True)
class _Choice:
    """Which rows and columns of a model's matrices `kept` leaves; rows of one kind run along the same widths."""

    joiner: Joiner
    kept: Kept
    axes: dict[tuple[str, str, str, bool], Axes] = field(default_factory=dict)
    #: By the set of parts and the rows of each: tensors share what stays of a width, the hidden size above all.
    numbers: dict[tuple[int, int], Rows] = field(default_factory=dict)

    def of(self, places: tuple[Place, ...], joined: Joined) -> Iterator[tuple[Rows | None, Rows | None]]:
        """Rows and columns of each place's matrix, as it is stored, that stay."""
        if not self.kept.widths:
            yield from ((None, None) for _ in places)
            return
        row = joined.row
        axes = self._axes(row)
        columns = None if len(joined.shape) < 2 else self._expanded(axes.columns, joined.shape[1], row)
        for place in places:
            parts = [
                (slot_rows(slot), self._expanded(axes.atoms[atom], slot.rows, row))
                for atom, slot in place.slots.items()
            ]
            if all(chosen is None for _, chosen in parts):
                rows = None
            else:
                rows = np.sort(np.concatenate([every if chosen is None else every[chosen] for every, chosen in parts]))
            yield (columns, rows) if place.transposed else (rows, columns)

    def _axes(self, row: Row) -> Axes:
        """The pruned widths that a row's parameter runs along.

        UsageError where it runs along one that stays, and that config.json says by the same key.
        """
        key = (row.site, row.spec.param, row.spec.op, row.same_as is None)
        if key in self.axes:
            return self.axes[key]
        joiner, widths = self.joiner, self.kept.widths
        twins = {twin: width for width in widths for twin in twins_of(joiner.table, width) if joiner.env.get(twin)}
        found = self.axes[key] = axes_of(row, joiner, {**dict.fromkeys(widths), **dict.fromkeys(twins)})
        for width in (*found.atoms, found.columns):
            if width is not None and width not in widths:
                raise UsageError(
                    f"config.json says ‹{WIDTHS[width]}› by the same key as ‹{WIDTHS[twins[width]]}›",
                    hint="prune both, to one size",
                )
        return found

    def _expanded(self, width: str | None, size: int, row: Row) -> Rows | None:
        """The numbers that stay along a dimension of `size`, which has equal blocks for the parts of `width`."""
        chosen = None if width is None else self.kept.of(width, row.layer, row.expert)
        if chosen is None or width is None:
            return None
        count = self.joiner.env[width]
        assert isinstance(count, int)
        block = size // count
        if (known := self.numbers.get((id(chosen), block))) is not None:
            return known
        every = np.asarray(chosen[:, None] * block + np.arange(block), dtype=np.int64).reshape(-1)
        return self.numbers.setdefault((id(chosen), block), every)
