"""Plans that compare two checkpoints of one format: the left side's tensors in the spelling of the right side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product

from converters.codecs.decode import Encoded
from converters.engine.plan import Draft, Entry, Plan, Unit, row_form
from converters.engine.regions import Move, Region, matrix
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.layout import Layout
from converters.rows.config_map import environment
from converters.rows.coverage import Ledger
from converters.rows.expr import Value
from converters.rows.ops import Dims, Form
from converters.rows.pack import Slot
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class Pairing:
    """A plan that makes the right side's tensors from the left side's, and what it cannot.

    `left_only` and `right_only` are tensors without a counterpart; `repeated` are those of either side that repeat
    another tensor or that Transformers recomputes, which the other side may do without. `equal` are those that have to
    repeat another one, as (whether on the right side, name, the other's name).
    """

    plan: Plan
    left_only: tuple[str, ...] = ()
    right_only: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    equal: tuple[tuple[bool, str, str], ...] = ()


def pair_by_name(
    left: Mapping[str, StoredTensor],
    right: Mapping[str, StoredTensor],
    depth: Callable[[str], int] = lambda _: 0,
    config: Mapping[str, Value] | None = None,
) -> Pairing:
    """Pair tensors of one name; `depth` are the leading dimensions of a tensor that stack entries."""
    shared = [name for name in left if name in right]
    drafts = tuple(Draft(name, left[name].dtype, left[name].shape, ()) for name in shared)
    units = [unit for name in shared for unit in same_units(left[name], right[name], depth(name))]
    return Pairing(
        _plan({name: left[name] for name in shared}, drafts, units, None, config or {}),
        tuple(name for name in left if name not in right),
        tuple(name for name in right if name not in left),
    )


def same_units(left: StoredTensor, right: StoredTensor, depth: int) -> list[Unit]:
    """Units that carry a tensor over as it is, one for each entry of its stack; rows that only one side has are left.

    Empty where the shapes do not allow it.
    """
    mine, other = left.shape[depth:], right.shape[depth:]
    if left.shape[:depth] != right.shape[:depth] or len(mine) != len(other) or mine[1:] != other[1:]:
        return []
    kept = min(matrix(left.shape, depth)[0], matrix(right.shape, depth)[0])
    slot = Slot.whole(kept)
    return [
        Unit(right.name, (Move(Region(left.name, index, slot), Region(right.name, index, slot)),), (entry,))
        for index in product(*map(range, left.shape[:depth]))
        for entry in (Entry(right.name, index),)
    ]


def pair_by_table(
    table: Table,
    config: Mapping[str, Value],
    left: Mapping[str, StoredTensor],
    right: Mapping[str, StoredTensor],
    encoded: Mapping[str, Encoded],
) -> Pairing:
    """Pair two sets of Hugging Face tensors that may spell a parameter differently (experts fused or apart).

    `config` is the Megatron Core config; `encoded` are tensors of the left side that a codec stores. Names that both
    sides have in one shape are paired as they are, the rest row by row of the table. Raises CoverageError where a row
    does not fit a tensor.
    """
    same = {name for name in left if name in right and left[name].shape == right[name].shape}
    planner = _ByRow(table, config, left, right, same)
    same |= planner.by_name
    plain = [unit for name in left if name in same for unit in same_units(left[name], right[name], 0)]
    made = [name for name in right if name in same or name in planner.made]
    drafts = tuple(
        Draft(n, left[n].dtype, left[n].shape, ()) if n in same else Draft(n, planner.made[n], right[n].shape, ())
        for n in made
    )
    used = same | planner.used
    plan = _plan({n: t for n, t in left.items() if n in used}, drafts, [*plain, *planner.units], table, config)
    plan = _with_encoded(plan, encoded)
    left_over = [name for name in left if name not in used]
    right_over = [name for name in right if name not in set(made)]
    return Pairing(
        plan,
        tuple(name for name in left_over if name not in planner.spare),
        tuple(name for name in right_over if name not in planner.spare),
        tuple(name for name in (*left_over, *right_over) if name in planner.spare),
        tuple(planner.equal),
    )


def _plan(
    sources: Mapping[str, StoredTensor],
    drafts: tuple[Draft, ...],
    units: list[Unit],
    table: Table | None,
    config: Mapping[str, Value],
) -> Plan:
    return Plan(
        direction="compare",
        table=table,
        config=config,
        layout=Layout(),
        sources=sources,
        drafts=drafts,
        units=tuple(units),
        ledger=Ledger(consumed=len(sources), produced=len(drafts)),
    )


def _with_encoded(plan: Plan, encoded: Mapping[str, Encoded]) -> Plan:
    return replace(plan, encoded={name: value for name, value in encoded.items() if name in plan.sources})


class _ByRow:
    """Pairs rows that the two sides spell differently: atoms go straight from one Hugging Face tensor to another."""

    def __init__(
        self,
        table: Table,
        config: Mapping[str, Value],
        left: Mapping[str, StoredTensor],
        right: Mapping[str, StoredTensor],
        same: Collection[str],
    ) -> None:
        self.left, self.right = left, right
        env = environment(config)
        self.dims: Dims = table.dims_at(env)
        self.experts = table.num_experts(env)
        self.units: list[Unit] = []
        self.used: set[str] = set()
        self.by_name: set[str] = set()
        self.made: dict[str, str] = {}
        rows = list(table.expand(env, left)), list(table.expand(env, right))
        self.spare = {name for side in rows for row in side if row.spec.drop or row.same_as for name in row.hf}
        self.equal = [
            (side is rows[1], row.hf[0], row.same_as)
            for side, tensors in zip(rows, (left, right), strict=True)
            for row in side
            if row.same_as in tensors and row.hf[0] in tensors and row.same_as is not None
        ]
        mine = {row.mcore: row for row in rows[0] if not (row.spec.drop or row.same_as)}
        for row in rows[1]:
            if row.spec.drop or row.same_as or all(name in same for name in row.hf):
                continue
            other = mine.get(row.mcore)
            if other is None or not all(n in left for n in other.hf) or not all(n in right for n in row.hf):
                continue
            if other.spec == row.spec:  # spelt alike, and of another shape: a finding, not another spelling
                self.by_name.update(row.hf)
            else:
                self._add(other, row)

    def _add(self, source: Row, target: Row) -> None:
        dtypes = {self.left[name].dtype for name in source.hf}
        if len(dtypes) > 1:
            raise CoverageError(f"`{source.mcore}`: {', '.join(source.hf)} have different dtypes: {sorted(dtypes)}")
        origins, places = self._regions(source, self.left), self._regions(target, self.right)
        if origins.keys() != places.keys():
            raise UnsupportedError(
                f"`{source.mcore}` is made of {', '.join(source.hf)} on one side and of {', '.join(target.hf)} on the "
                "other, which the table does not bring together"
            )
        moves = tuple(Move(origins[atom], places[atom]) for atom in origins)
        entries = tuple(Entry(name, _entry(target)) for name in target.hf)
        self.units.append(Unit(source.mcore, moves, entries, source.spec.shift - target.spec.shift))
        self.used.update(source.hf)
        self.made.update(dict.fromkeys(target.hf, dtypes.pop()))

    def _regions(self, row: Row, tensors: Mapping[str, StoredTensor]) -> dict[int, Region]:
        shapes = [self._logical(row, tensors[name].shape) for name in row.hf]
        rows = sum(shape[0] if shape else 1 for shape in shapes)
        form: Form = row_form(row, self.dims, rows)
        if form.columns:
            raise UnsupportedError(f"`{row.mcore}`: halves of columns are not compared between two spellings")
        out = {}
        for name, shape, pack, (_, members) in zip(row.hf, shapes, form.hf_packs(), form.hf, strict=True):
            if (shape[0] if shape else 1) != pack.rows:
                raise CoverageError(f"`{name}` has shape {list(tensors[name].shape)}; {pack.rows} rows were expected")
            for atom, slot in zip(members, pack.slots(), strict=True):
                out[atom] = Region(name, _entry(row), slot, row.spec.transpose)
        return out

    def _logical(self, row: Row, shape: Shape) -> Shape:
        if row.spec.stacked:
            if shape[:1] != (self.experts,):
                raise CoverageError(f"`{row.hf[0]}` has shape {list(shape)}; {self.experts} experts were expected")
            shape = shape[1:]
        return shape[::-1] if row.spec.transpose else shape


def _entry(row: Row) -> tuple[int, ...]:
    return (row.expert,) if row.spec.stacked and row.expert is not None else ()
