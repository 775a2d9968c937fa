"""Plans between adapters of two spellings: every factor moves atom by atom, as the weight's rows do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from converters.adapters.megatron import megatron_sites
from converters.adapters.peft_names import PREFIX, peft_sites
from converters.adapters.sites import Adapted, columns, spellings
from converters.engine.lowrank import Site
from converters.engine.plan import Draft, Entry, Plan, Unit, row_form
from converters.engine.regions import Move, Region
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.layout import Layout, RankMap
from converters.mcore.layout import check as check_layout
from converters.mcore.torch_dist import homes, stacks_layers
from converters.planning.placing import place_boxes
from converters.rows.config_map import environment
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
    env = environment(config)
    layers, experts = table.num_layers(env), table.num_experts(env)
    stackable = _stackable(adapted, layers) if stacks_layers(table.family, config) else frozenset()
    pairs: Pairs = []
    for found in adapted:
        places = homes(found.row, found.row.spec.param in stackable, layers, experts)
        pairs.append((found, megatron_sites(found, places[0], fused=fused)))
    carrier = _Carrier(sources)
    carrier.carry(pairs)
    ranks = RankMap(layout, config)
    cuts = {name: cut for found, sites in pairs for site in sites for name, cut in _cuts(found, site)}
    drafts = []
    for name, target in carrier.targets.items():
        target.check(name)
        boxes = place_boxes(
            name,
            target.shape[target.depth :],
            target.shape[: target.depth],
            cuts[name],
            layout,
            ranks,
            sorted(target.entries),
        )
        drafts.append(Draft(name, target.dtype, target.shape, boxes))
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


def _cuts(found: Adapted, site: Site) -> list[tuple[str, Form]]:
    """How tensor parallelism cuts a site's tensors: B's rows with the weight's, A's columns with the weight's."""
    whole = len(site.atoms) == len(found.form.atoms)
    rows = found.form if whole and len(found.row.hf) > 1 else Form((site.pack.rows,), ((1, (0,)),))
    along = found.form.cut
    b = Form(rows.atoms, rows.hf, rows.mcore_groups, rows.mcore_order, 0 if along == 0 else None)
    a = Form((site.rank,), ((1, (0,)),), cut=1 if along == 1 else None)
    return [(site.a, a), (site.b, b)] + ([] if site.m is None else [(site.m, b)])


def plan_to_peft(
    table: Table,
    config: Mapping[str, Value],
    adapted: Sequence[Adapted],
    sources: Mapping[str, StoredTensor],
    recorded: Collection[str] | None = None,
) -> Plan:
    """Plan that writes adapters (`read_megatron`'s) under PEFT's names.

    `recorded` are the names of the PEFT folder they once came from. Without it an adapter of a whole expert linear is
    written as one of the parameter that holds all experts where the table knows that, else by projection.
    """
    env = environment(config)
    dims, experts = table.dims_at(env), table.num_experts(env)
    chosen = [(found, spelt(table, found, recorded)) for found in adapted]
    owners: dict[str, list[str]] = {}
    for _, row in chosen:
        if row.spec.stacked:
            names = owners.setdefault(row.hf[0].rpartition(".")[0], [])
            if row.hf[0] not in names:
                names.append(row.hf[0])
    pairs: Pairs = []
    for found, row in chosen:
        form = row_form(row, dims, found.form.mcore_pack().rows)
        beside = owners.get(row.hf[0].rpartition(".")[0], [row.hf[0]])
        nested = len(beside) - 1 - beside.index(row.hf[0]) if row.spec.stacked else 0
        pairs.append((found, peft_sites(row, form, found, experts, nested)))
    carrier = _Carrier(sources)
    carrier.carry(pairs)
    drafts = [
        Draft(name, target.dtype, target.shape, ((0, tuple(0 for _ in target.shape), target.shape),))
        for name, target in sorted(carrier.targets.items())
    ]
    return carrier.plan("adapter-to-hf", table, config, Layout(), drafts)


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
    one = len(found.sites) == 1 and len(found.sites[0].atoms) == len(found.form.atoms)
    together = next((row for row in rows if row.spec.stacked), None)
    if found.row.expert is None or together is None:
        return rows[0]
    apart = next((row for row in rows if not row.spec.stacked), None)
    return together if one or apart is None else apart


@dataclass(slots=True)
class _Target:
    """A target tensor; the first `depth` dimensions are a stack, of which `entries` are filled."""

    dtype: str
    shape: Shape
    depth: int
    entries: set[Shape] = field(default_factory=set)

    def check(self, name: str) -> None:
        """CoverageError where the stack has gaps."""
        size = 1
        for extent in self.shape[: self.depth]:
            size *= extent
        if len(self.entries) != size:
            raise CoverageError(
                f"`{name}` needs {size} adapters (layers, experts); {len(self.entries)} are there",
                hint="experts are adapted all together or not at all",
            )


class _Carrier:
    """Collects the units that carry factors from site to site."""

    def __init__(self, sources: Mapping[str, StoredTensor]) -> None:
        self.sources = sources
        self.targets: dict[str, _Target] = {}
        self.equal: dict[tuple[str, str], None] = {}
        self._moves: dict[tuple[object, ...], list[Move]] = {}
        self._entries: dict[tuple[object, ...], dict[Entry, None]] = {}
        self._names: dict[tuple[object, ...], str] = {}

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
            self._b(found, origin, target, atom)
            if target.m is not None and origin.m is not None:
                self._m(found, origin, target, atom)
        source = Region(first.a, first.index, first.a_slot)
        self._add(
            found,
            target.a,
            target,
            target.a_shape,
            first.a,
            first,
            Move(source, Region(target.a, target.index, target.a_slot)),
            1,
        )

    def _m(self, found: Adapted, origin: Site, target: Site, atom: int) -> None:
        assert origin.m is not None and target.m is not None
        move = Move(
            Region(origin.m, origin.index, origin.rows()[atom]), Region(target.m, target.index, target.rows()[atom])
        )
        self._add(found, target.m, target, target.m_shape, origin.m, origin, move, 1)

    def _b(self, found: Adapted, origin: Site, target: Site, atom: int) -> None:
        here, there = origin.rows()[atom], target.rows()[atom]
        if not (origin.experts or target.experts):
            moves = [Move(Region(origin.b, origin.index, here), Region(target.b, target.index, there))]
            fold = 1
        elif (origin.pack, origin.atoms) == (target.pack, target.atoms):
            # whole columns of B, and B seen by columns: rank r of this expert is column `r * experts + expert`
            if atom != target.atoms[0]:
                return
            move = Move(
                Region(origin.b, origin.index, _by_column(origin), transposed=True),
                Region(target.b, target.index, _by_column(target), transposed=True),
            )
            moves, fold = [move], 1
        else:
            moves, fold = _by_element(origin, target, here, there), target.b_shape[-1]
        for move in moves:
            self._add(found, target.b, target, target.b_shape, origin.b, origin, move, fold)

    def _add(
        self, found: Adapted, name: str, target: Site, shape: Shape, source: str, origin: Site, move: Move, fold: int
    ) -> None:
        known = self.targets.setdefault(name, _Target(self.sources[source].dtype, shape, len(target.stack)))
        if (known.shape, known.dtype) != (shape, self.sources[source].dtype):
            raise CoverageError(
                f"`{name}` would have shapes {list(known.shape)} and {list(shape)}, or two dtypes: adapters that are "
                "stored together must be alike"
            )
        known.entries.add(target.index)
        # experts that share a source tensor are carried together, so that it is read once
        key = (name, target.index[:-1], source) if origin.experts else (name, target.index)
        self._names.setdefault(key, f"{found.row.mcore} ← {source}")
        self._moves.setdefault(key, []).append(move)
        self._entries.setdefault(key, {})[Entry(name, target.index, fold)] = None

    def plan(
        self, direction: str, table: Table, config: Mapping[str, Value], layout: Layout, drafts: list[Draft]
    ) -> Plan:
        """The plan of everything carried."""
        units = [Unit(self._names[key], tuple(moves), tuple(self._entries[key])) for key, moves in self._moves.items()]
        used = {move.source.tensor for moves in self._moves.values() for move in moves}
        return Plan(
            direction=direction,
            table=table,
            config=config,
            layout=layout,
            sources={name: tensor for name, tensor in self.sources.items() if name in used or self._repeats(name)},
            drafts=tuple(drafts),
            units=tuple(units),
            ledger=Ledger(
                consumed=len(self.sources), produced=len(drafts), repeated=tuple(name for name, _ in self.equal)
            ),
            equal=tuple(self.equal),
        )

    def _repeats(self, name: str) -> bool:
        return any(name == other for other, _ in self.equal)


def _by_column(site: Site) -> Slot:
    """Columns of B that are this site's, as rows of B turned round."""
    return Slot(site.expert, 1, site.experts, site.rank) if site.experts else Slot.whole(site.rank)


def _by_element(origin: Site, target: Site, here: Slot, there: Slot) -> list[Move]:
    """Moves of one atom's elements, column by column: rows and columns are both in another order."""
    moves = []
    for rank in range(target.rank):
        ends = []
        for site, slot in ((origin, here), (target, there)):
            width = site.b_shape[-1]
            column = rank * site.experts + site.expert if site.experts else rank
            ends.append([Region(site.b, site.index, part, fold=width) for part in columns(slot, width, column)])
        if len(ends[0]) != len(ends[1]):
            raise UnsupportedError(f"`{origin.b}` and `{target.b}` lay out their rows in ways that do not meet")
        moves += [Move(left, right) for left, right in zip(*ends, strict=True)]
    return moves
