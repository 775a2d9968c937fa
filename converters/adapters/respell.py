"""Plans between adapters of two spellings: every factor moves atom by atom, as the weight's rows do."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from converters.adapters.megatron import megatron_sites
from converters.adapters.peft_keys import PREFIX, live_spelling, recorded_keys
from converters.adapters.peft_names import peft_sites
from converters.adapters.sites import Adapted, columns, spellings
from converters.engine.lowrank import Site
from converters.engine.plan import Draft, Entry, Plan, Unit, row_form
from converters.engine.regions import Move, Region
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.layout import Layout, RankMap
from converters.mcore.layout import check as check_layout
from converters.mcore.torch_dist import homes
from converters.planning.join import Joiner
from converters.planning.placing import Target
from converters.rows.coverage import Ledger
from converters.rows.expr import Value
from converters.rows.ops import Form
from converters.rows.pack import Slot
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

#: A source site and a target site, and the weight they belong to.
Pairs = list[tuple[Adapted, tuple[Site, ...]]]


def plan_to_megatron(
    table: Table,
    config: Mapping[str, Value],
    adapted: Sequence[Adapted],
    sources: Mapping[str, StoredTensor],
    layout: Layout,
    *,
    fused: bool = False,
) -> Plan:
    """Plan that writes adapters (`read_peft`'s) as a torch_dist checkpoint under `layout`.

    Layers are stacked where the model's are and all of them carry an adapter of one shape, else each has its keys.
    `fused` writes one A for query, key and value (gate and up): those must be equal. Raises UnsupportedError for what
    has no place there, LayoutError where the layout does not fit.
    """
    check_layout(layout, config)
    joiner = Joiner.at(table, config)
    stackable = _stackable(adapted, joiner.layers) if joiner.stacked else frozenset()
    pairs: Pairs = []
    for found in adapted:
        places = homes(found.row, found.row.spec.param in stackable, joiner.layers, joiner.experts)
        pairs.append((found, megatron_sites(found, places[0], fused=fused)))
    carrier = _Carrier(sources)
    carrier.carry(pairs)
    for name, target in carrier.targets.items():
        if target.gaps:
            size = math.prod(target.stack)
            raise CoverageError(
                f"`{name}` needs {size} adapters (layers, experts); {len(target.entries)} are there",
                hint="experts are adapted all together or not at all",
            )
    ranks = RankMap(layout, config)
    drafts = [target.draft(name, layout, ranks) for name, target in carrier.targets.items()]
    return carrier.plan("adapter-to-mcore", table, config, layout, drafts)


def _stackable(adapted: Iterable[Adapted], layers: int) -> frozenset[str]:
    """Parameters whose adapters are alike in every layer."""
    shapes: dict[str, dict[int | None, set[tuple[object, ...]]]] = {}
    for found in adapted:
        alike = tuple((site.atoms, site.rank, site.inputs, site.m is None) for site in found.sites)
        shapes.setdefault(found.row.spec.param, {}).setdefault(found.row.index, set()).add(alike)
    return frozenset(
        param
        for param, by_layer in shapes.items()
        if len(by_layer) == layers and len(set.union(*by_layer.values())) == 1
    )


def _cut(found: Adapted, site: Site, factor: str) -> Form:
    """How tensor parallelism cuts a factor: the rows of B and m with the weight's, A's columns with the weight's."""
    along = found.form.cut
    if factor == "a":
        return Form((site.rank,), ((1, (0,)),), cut=1 if along == 1 else None)
    whole = len(site.atoms) == len(found.form.atoms) and len(found.row.hf) > 1
    rows = found.form if whole else Form((site.pack.rows,), ((1, (0,)),))
    return replace(rows, cut=0 if along == 0 else None, columns=False)


def plan_to_peft(
    table: Table,
    config: Mapping[str, Value],
    adapted: Sequence[Adapted],
    sources: Mapping[str, StoredTensor],
    recorded: Collection[str] | None = None,
) -> Plan:
    """Plan that writes adapters (`read_megatron`'s) under PEFT's names.

    `recorded` are the names of the PEFT folder they once came from. Without it an adapter of a whole expert linear is
    written as one of the parameter that holds all experts where the table knows that, else by projection, under the
    names that Transformers has in memory.
    """
    joiner = Joiner.at(table, config)
    keys = {} if recorded is None else recorded_keys(table, joiner.env, recorded)[1]
    adapted = adapted if recorded is not None else in_memory(table, adapted)
    chosen = [(found, spelt(table, found, keys or recorded)) for found in adapted]
    owners: dict[str, list[str]] = {}
    for _, row in chosen:
        if row.spec.stacked:
            names = owners.setdefault(row.hf[0].rpartition(".")[0], [])
            if row.hf[0] not in names:
                names.append(row.hf[0])
    pairs: Pairs = []
    for found, row in chosen:
        form = row_form(row, joiner.at_row(row)[1], found.form.mcore_pack().rows)
        beside = owners.get(row.hf[0].rpartition(".")[0], [row.hf[0]])
        nested = len(beside) - 1 - beside.index(row.hf[0]) if row.spec.stacked else 0
        sites = peft_sites(row, form, found, joiner.experts, nested)
        pairs.append((found, tuple(_under(site, keys) for site in sites)))
    carrier = _Carrier(sources)
    carrier.carry(pairs)
    drafts = [
        Draft.whole(name, target.dtype, (*target.stack, *target.shape))
        for name, target in sorted(carrier.targets.items())
    ]
    return carrier.plan("adapter-to-hf", table, config, Layout(), drafts)


def in_memory(table: Table, adapted: Sequence[Adapted]) -> list[Adapted]:
    """Adapters whose weights have the names that Transformers' model has for them (`live_spelling`)."""
    live = live_spelling(table)
    return [
        replace(found, row=replace(found.row, hf=tuple(live.said(name) for name in found.row.hf))) for found in adapted
    ]


def _under(site: Site, keys: Mapping[str, str]) -> Site:
    """A site whose tensors have the names of the file they once came from, `keys` by PEFT's own."""
    m = None if site.m is None else keys.get(site.m, site.m)
    return replace(site, a=keys.get(site.a, site.a), b=keys.get(site.b, site.b), m=m)


def spelt(table: Table, found: Adapted, recorded: Collection[str] | None) -> Row:
    """The spelling of a weight that PEFT's names follow."""
    rows = spellings(table, found.row)
    if recorded is not None:
        for row in rows:
            if not row.spec.stacked:
                if any(f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight" in recorded for name in row.hf):
                    return row
            elif f"{PREFIX}{row.hf[0].rpartition('.')[0]}.lora_A.weight" in recorded:
                return row
    one = len({site.a_key for site in found.sites}) == 1 and all(map(found.site_of, range(len(found.form.atoms))))
    together = next((row for row in rows if row.spec.stacked), None)
    if found.row.expert is None or together is None:
        return rows[0]
    apart = next((row for row in rows if not row.spec.stacked), None)
    return together if one or apart is None else apart


def _tensor_of(site: Site, factor: str) -> tuple[str, Shape]:
    """Name and shape of the tensor of a factor: "a", "b" or "m"."""
    if factor == "m":
        assert site.m is not None
        return site.m, site.m_shape
    return (site.a, site.a_shape) if factor == "a" else (site.b, site.b_shape)


@dataclass(slots=True)
class _Carried:
    """A unit in the making."""

    name: str
    moves: list[Move] = field(default_factory=list)
    entries: dict[Entry, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Carrier:
    """Collects the units that carry factors from site to site."""

    sources: Mapping[str, StoredTensor]
    targets: dict[str, Target] = field(default_factory=dict)
    equal: dict[tuple[str, str], None] = field(default_factory=dict)
    _carried: dict[tuple[object, ...], _Carried] = field(default_factory=dict)

    def carry(self, pairs: Pairs) -> None:
        for found, sites in pairs:
            for target in sites:
                self._factors(found, target)

    def _factors(self, found: Adapted, target: Site) -> None:
        origins = {atom: found.site_of(atom) for atom in target.atoms}
        first = origins[target.atoms[0]]
        assert first is not None
        for atom, origin in origins.items():
            if origin is None:
                raise UnsupportedError(f"`{target.b}` needs an adapter on all of {', '.join(found.row.hf)}")
            if (origin.rank, origin.inputs) != (first.rank, first.inputs):
                raise UnsupportedError(f"`{target.a}`: parts of ranks {first.rank} and {origin.rank} have no one A")
            if origin is not first and origin.a_key != first.a_key:
                if not (origin.owns_a and first.owns_a):
                    raise UnsupportedError(
                        f"`{target.a}` is one A for {', '.join(found.row.hf)}, which have factors of their own"
                    )
                self.equal[origin.a, first.a] = None
            here, there = origin.rows()[atom], target.rows()[atom]
            if not (origin.experts or target.experts):
                self._add(found, "b", origin, target, [(here, there)])
            elif (origin.pack, origin.atoms) != (target.pack, target.atoms):
                self._add(found, "b", origin, target, _by_element(origin, target, here, there), by_element=True)
            elif atom == target.atoms[0]:
                # whole columns of B, and B seen by columns: rank r of this expert is column `r * experts + expert`
                ends = [(_by_column(origin), _by_column(target))]
                self._add(found, "b", origin, target, ends, transposed=True)
            if target.m is not None and origin.m is not None:
                self._add(found, "m", origin, target, [(here, there)])
        self._add(found, "a", first, target, [(first.a_slot, target.a_slot)])

    def _add(
        self,
        found: Adapted,
        factor: str,
        origin: Site,
        target: Site,
        ends: Sequence[tuple[Slot, Slot]],
        *,
        transposed: bool = False,
        by_element: bool = False,
    ) -> None:
        """Rows of a factor, as (from, to): of it turned round, or of its elements one by one."""
        (source, _), (name, shape) = (_tensor_of(site, factor) for site in (origin, target))
        dtype, depth = self.sources[source].dtype, len(target.stack)
        form = _cut(found, target, factor)
        known = self.targets.setdefault(name, Target(dtype, shape[:depth], shape[depth:], form))
        if ((*known.stack, *known.shape), known.dtype) != (shape, dtype):
            raise CoverageError(
                f"`{name}` would have shapes {[*known.stack, *known.shape]} and {list(shape)}, or two dtypes: "
                "adapters that are stored together must be alike"
            )
        known.entries.add(target.index)
        widths = [site.b_shape[-1] if by_element else 1 for site in (origin, target)]
        # experts that share a source tensor are carried together, so that it is read once
        key = (name, target.index[:-1], source) if origin.experts else (name, target.index)
        carried = self._carried.setdefault(key, _Carried(f"{found.row.mcore} ← {source}"))
        carried.moves += [
            Move(
                Region(source, origin.index, here, transposed, widths[0]),
                Region(name, target.index, there, transposed, widths[1]),
            )
            for here, there in ends
        ]
        carried.entries[Entry(name, target.index, widths[1])] = None

    def plan(
        self, direction: str, table: Table, config: Mapping[str, Value], layout: Layout, drafts: list[Draft]
    ) -> Plan:
        """The plan of everything carried."""
        carried = self._carried.values()
        units = tuple(Unit(unit.name, tuple(unit.moves), tuple(unit.entries)) for unit in carried)
        used = {move.source.tensor for unit in carried for move in unit.moves} | {name for name, _ in self.equal}
        return Plan(
            direction=direction,
            table=table,
            config=config,
            layout=layout,
            sources={name: tensor for name, tensor in self.sources.items() if name in used},
            drafts=tuple(drafts),
            units=units,
            ledger=Ledger(
                consumed=len(self.sources), produced=len(drafts), repeated=tuple(name for name, _ in self.equal)
            ),
            equal=tuple(self.equal),
        )


def _by_column(site: Site) -> Slot:
    """Columns of B that are this site's, as rows of B turned round."""
    return Slot(site.expert, 1, site.experts, site.rank) if site.experts else Slot.whole(site.rank)


def _by_element(origin: Site, target: Site, here: Slot, there: Slot) -> list[tuple[Slot, Slot]]:
    """One atom's elements, column by column: rows and columns are both in another order."""
    ends: list[tuple[Slot, Slot]] = []
    for rank in range(target.rank):
        left, right = (
            columns(slot, site.b_shape[-1], rank * site.experts + site.expert if site.experts else rank)
            for site, slot in ((origin, here), (target, there))
        )
        if len(left) != len(right):
            raise UnsupportedError(f"`{origin.b}` and `{target.b}` lay out their rows in ways that do not meet")
        ends += zip(left, right, strict=True)
    return ends
