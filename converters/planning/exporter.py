"""Plans Megatron Core (torch_dist keys) → Hugging Face."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from converters.codecs.decode import Encoded
from converters.engine.plan import FLOATS, Draft, Entry, Plan, Unit, as_it_is, with_heads_present
from converters.engine.regions import matrix
from converters.errors import CoverageError
from converters.mcore.keys import bare
from converters.mcore.layout import Layout
from converters.mcore.torch_dist import Home
from converters.planning.join import PADDED, Joiner, moves, one_dtype
from converters.rows.coverage import NO_WAIVERS, Ledger, Waivers, reject_twice, settle
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_groups
from converters.rows.shapes import check_shape
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A Hugging Face tensor as the source folder stored it: dtype and shape."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of the Hugging Face folder that a checkpoint came from.

    `recorded` is what it held: it decides between alternative spellings and gives promoted tensors their dtype back;
    without it the table's first alternatives are written. `kept` are its tensors that travelled beside the
    checkpoint's own and are written as they are. `encode` are tensors to store in the parts of a codec, as it did, and
    `scales` its scales of some of them, with the parts that no value changes, by the tensor's name and role.
    """

    recorded: Mapping[str, HfTensor] | None = None
    kept: Mapping[str, StoredTensor] = field(default_factory=dict)
    encode: Mapping[str, Encoded] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)


def plan_export(
    table: Table,
    config: Mapping[str, Value],
    sources: Mapping[str, StoredTensor],
    origin: Origin | None = None,
    *,
    dtype: str | None = None,
    exact_norms: bool = False,
    waivers: Waivers = NO_WAIVERS,
) -> Plan:
    """Plan that turns `sources` (torch_dist keys) into Hugging Face tensors.

    `config` is the Megatron Core config. `exact_norms` writes in fp32 what 16 bits would round: norms stored in 16
    bits as gamma, which the folder has as 1 + gamma. A requested `dtype` wins.
    Raises CoverageError unless every tensor is accounted for.
    """
    origin = origin or Origin()
    joiner = Joiner.at(table, config)
    rows = [row for row in table.expand(joiner.env, origin.recorded, sources) if not row.spec.drop]
    rows = rows + _repeats_beside(joiner, rows, sources, origin)
    planner = _Exporter(joiner, sources, origin, dtype, exact_norms)
    own = [(row, joiner.homes(row, sources)) for row in rows if row.same_as is None]
    away = _layers_beside(own, sources, origin)
    own = [(row, homes) for row, homes in own if _layer_of(row) not in away]
    missing, unused = settle(
        table.name, "checkpoint", sources, [home.key for _, homes in own for home in homes], waivers
    )
    claims = [(f"{home.key}{list(home.index)}", row.mcore) for row, homes in own for home in homes]
    reject_twice(table.name, "Megatron Core", claims)
    for row, homes in own:
        planner.add(row, homes)
    for row in rows:
        if row.same_as is not None:
            planner.repeat(row, row.same_as)
    for tensor in origin.kept.values():
        if tensor.name not in planner.targets:
            planner.keep(tensor)
    drafts = planner.drafts()
    return Plan(
        direction="mcore-to-hf",
        table=table,
        config=with_heads_present(config, rows),
        layout=Layout(),
        sources={**{name: t for name, t in sources.items() if name not in unused}, **origin.kept},
        drafts=drafts,
        units=tuple(planner.units),
        ledger=Ledger(
            consumed=len(sources) - len(unused),
            produced=len(drafts),
            waived_missing=missing,
            waived_unused=unused,
            dropped=tuple(name for name in origin.recorded or {} if name not in planner.targets),
            repeated=tuple(row.hf[0] for row in rows if row.same_as is not None),
        ),
        dtype_changes=planner.dtype_changes,
        reencoded=planner.reencoded,
        scales={name: known for name, known in origin.scales.items() if name in planner.reencoded},
        notes=tuple(inexpressible_groups(config)),
    )


def _layer_of(row: Row) -> tuple[str, int | None]:
    """The layer that a row is of, by where its stack's names begin, and its number there."""
    return row.site.partition("{")[0], row.index


def _layers_beside(
    rows: Iterable[tuple[Row, tuple[Home, ...]]], sources: Mapping[str, StoredTensor], origin: Origin
) -> set[tuple[str, int | None]]:
    """Prediction layers that the model was built without, whose tensors travelled beside it: wholly, or not at all.

    Of any other row what travelled is the original, whose values a run has changed since.
    """
    ahead = [(row, homes) for row, homes in rows if bare(row.site).startswith("mtp.")] if origin.kept else []
    held = {
        _layer_of(row)
        for row, homes in ahead
        if any(home.key in sources for home in homes) or not all(name in origin.kept for name in row.hf)
    }
    return {_layer_of(row) for row, _ in ahead} - held


def _repeats_beside(joiner: Joiner, rows: list[Row], sources: Mapping[str, StoredTensor], origin: Origin) -> list[Row]:
    """Copies in layers that travelled beside the model: they follow what they repeat, and did not travel."""
    if not origin.kept or origin.recorded is None:
        return []
    every = [row for row in joiner.table.expand(joiner.env, origin.recorded) if not (row.spec.drop or row.kept)]
    own = [(row, joiner.homes(row, sources)) for row in every if row.same_as is None]
    away = _layers_beside(own, sources, origin)
    known = {name for row in rows for name in row.hf} | origin.kept.keys()
    copies = [row for row in every if row.same_as is not None and row.hf[0] not in known]
    return [row for row in copies if _layer_of(row) in away]


@dataclass(slots=True)
class _Exporter:
    """Collects the units and targets of one export; `targets` are by name (dtype, shape)."""

    joiner: Joiner
    sources: Mapping[str, StoredTensor]
    origin: Origin
    dtype: str | None
    exact_norms: bool
    units: list[Unit] = field(default_factory=list)
    targets: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    makers: dict[str, Unit] = field(default_factory=dict)
    reencoded: dict[str, Encoded] = field(default_factory=dict)
    dtype_changes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, row: Row, homes: tuple[Home, ...]) -> None:
        if any(home.key not in self.sources for home in homes):
            return  # waived as missing: the ledger names it
        tensors = [self.sources[home.key] for home in homes]
        joined = self.joiner.from_mcore(row, homes, tensors)
        check_shape(row, joined.shape, self.joiner.fields_of(row))
        stored = one_dtype(row, tensors)
        # a tensor that stands twice in a row is read for both atoms, and written from the first
        places = tuple({place.tensor: place for place in reversed(joined.hf)}.values())[::-1]
        for place in places:
            name, shape = place.tensor, (*place.stack, *place.shape)
            if row.spec.op == PADDED:
                shape = (self._padded(row, name, shape[0]), *shape[1:])
            made = self._dtype(row, name, stored), shape
            known = self.targets.setdefault(name, made)
            if known != made:
                raise CoverageError(f"`{name}` would be {made[1]} {made[0]} and {known[1]} {known[0]} at once")
            if made[0] != stored:
                self.dtype_changes[stored, made[0]] += 1
            if name in self.origin.encode and row.spec.shift:
                raise CoverageError(f"`{name}` is stored by a codec, and its values are shifted: nothing encodes that")
        original = row.hf[0] if row.spec.shift and self._is_original(row.hf[0]) else None
        filled = tuple(place.entry for place in places)
        unit = Unit(row.mcore, moves(joined.mcore, places), filled, -row.spec.shift, original)
        self.units.append(unit)
        self.makers.update(dict.fromkeys(row.hf, unit))

    def _padded(self, row: Row, name: str, rows: int) -> int:
        """Rows of a Hugging Face tensor that goes on with zeros: as the folder had it, or as the config says."""
        padded = max(rows, self.joiner.at_row(row)[1].get("kda_padded", rows))
        if (known := (self.origin.recorded or {}).get(name)) is None:
            return padded
        if known.shape not in ((rows,), (padded,)):
            sizes = " or ".join(map(str, dict.fromkeys((rows, padded))))
            raise CoverageError(
                f"`{name}` is recorded with shape {list(known.shape)}; one dimension of {sizes} was expected",
                hint="what is recorded beside the checkpoint is not of it: convert the folder again",
            )
        return known.shape[0]

    def _dtype(self, row: Row, name: str, stored: str) -> str:
        if stored not in FLOATS or name in self.origin.encode:
            return stored  # codes are made from the values as they are
        if self.dtype is not None and not row.spec.keep_dtype and row.spec.dtype is None:
            return self.dtype
        if self.exact_norms and row.spec.shift and self.dtype is None:
            return "F32" if stored in ("BF16", "F16") else stored
        recorded = self.origin.recorded or {}
        return recorded[name].dtype if row.spec.dtype is not None and name in recorded else stored

    def repeat(self, row: Row, first: str) -> None:
        """A tensor that is written again under a second name."""
        name, unit = row.hf[0], self.makers.get(first)
        if unit is None:
            raise CoverageError(f"table `{self.joiner.table.name}`: `{name}` repeats `{first}`, which no row makes")
        self.targets[name] = self.targets[first]
        again = tuple(
            replace(move, target=replace(move.target, tensor=name))
            for move in unit.moves
            if move.target.tensor == first
        )
        self.units.append(Unit(row.mcore, again, (Entry(name, ()),), unit.shift))

    def _is_original(self, name: str) -> bool:
        """Whether the tensor `name` travelled along with the dtype and shape it gets now."""
        tensor = self.origin.kept.get(name)
        return tensor is not None and self.targets[name] == (tensor.dtype, tensor.shape)

    def keep(self, tensor: StoredTensor) -> None:
        """A tensor that is written as it was read."""
        self.targets[tensor.name] = (tensor.dtype, tensor.shape)
        self.units += as_it_is(tensor.name, tensor.name, (), matrix(tensor.shape, 0)[0])

    def drafts(self) -> tuple[Draft, ...]:
        out = []
        for name, (dtype, shape) in self.targets.items():
            if (whole := self.origin.encode.get(name)) is None:
                out.append(Draft.whole(name, dtype, shape))
                continue
            if shape != whole.tensor.shape or dtype not in FLOATS:
                raise CoverageError(
                    f"`{name}` is {dtype} {list(shape)} now; the source's codes stand for {list(whole.tensor.shape)}",
                    hint="leave out ‹codec› same to write it plainly",
                )
            self.reencoded[name] = Encoded(StoredTensor(name, dtype, shape, ()), whole.codec, whole.parts)
            self.dtype_changes[dtype, whole.codec.name] += 1
            out += [Draft.whole(part.name, part.dtype, part.shape) for part in whole.parts.values()]
        return tuple(out)
