"""Plans that compare two checkpoints of one format: the left side's tensors in the spelling of the right side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from converters.codecs.decode import Encoded
from converters.engine.plan import Draft, Plan, Unit, as_it_is
from converters.engine.regions import matrix
from converters.errors import UnsupportedError
from converters.planning.join import Joiner, moves, one_dtype
from converters.rows.expr import Value
from converters.rows.table import Row, Table
from converters.tensors import StoredTensor


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
        Plan.of_all("compare", config or {}, {name: left[name] for name in shared}, drafts, units),
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
    return as_it_is(left.name, right.name, left.shape[:depth], kept)


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
    joiner = Joiner.at(table, config)
    mine, other = (list(table.expand(joiner.env, names)) for names in (left, right))
    copies = (row for row in (*mine, *other) if row.spec.drop and not row.spec.beside or row.same_as)
    spare = {name for row in copies for name in row.hf}
    by_name, respelt = _pairs(mine, other, left, right, same)
    same |= by_name
    units = [unit for name in left if name in same for unit in same_units(left[name], right[name], 0)]
    used, dtypes = set(same), {name: left[name].dtype for name in same}
    for source, target in respelt:
        dtype = one_dtype(source, [left[name] for name in source.hf])
        units.append(_respelt(joiner, source, target, left, right))
        used.update(source.hf)
        dtypes.update(dict.fromkeys(target.hf, dtype))
    drafts = tuple(Draft(n, dtypes[n], (left if n in same else right)[n].shape, ()) for n in right if n in dtypes)
    sources = {n: t for n, t in left.items() if n in used}
    plan = Plan.of_all("compare", config, sources, drafts, units, table=table)
    left_over = [name for name in left if name not in used]
    right_over = [name for name in right if name not in dtypes]
    return Pairing(
        replace(plan, encoded={name: whole for name, whole in encoded.items() if name in sources}),
        tuple(name for name in left_over if name not in spare),
        tuple(name for name in right_over if name not in spare),
        tuple(name for name in (*left_over, *right_over) if name in spare),
        tuple(
            (tensors is right, row.hf[0], row.same_as)
            for rows, tensors in ((mine, left), (other, right))
            for row in rows
            if row.same_as is not None and row.same_as in tensors and row.hf[0] in tensors
        ),
    )


def _pairs(
    mine: Iterable[Row],
    other: Iterable[Row],
    left: Collection[str],
    right: Collection[str],
    same: Collection[str],
) -> tuple[set[str], list[tuple[Row, Row]]]:
    """Names to pair as they are though their shapes differ, and rows that the two sides spell differently."""
    known = {row.mcore: row for row in mine if not (row.spec.drop or row.same_as)}
    by_name: set[str] = set()
    respelt = []
    for row in other:
        source = known.get(row.mcore)
        if row.spec.drop or row.same_as or source is None or all(name in same for name in row.hf):
            continue
        if not all(name in left for name in source.hf) or not all(name in right for name in row.hf):
            continue
        # Spelt alike, and of another shape: a finding, not another spelling.
        if (source.spec, source.hf) == (row.spec, row.hf):
            by_name.update(row.hf)
        else:
            respelt.append((source, row))
    return by_name, respelt


def _respelt(
    joiner: Joiner, source: Row, target: Row, left: Mapping[str, StoredTensor], right: Mapping[str, StoredTensor]
) -> Unit:
    """Atoms that go straight from the tensors of one spelling to those of another."""
    origins, places = (
        joiner.from_hf(row, [tensors[name] for name in row.hf]) for row, tensors in ((source, left), (target, right))
    )
    if origins.form.columns or places.form.columns:
        raise UnsupportedError(f"`{source.mcore}`: halves of columns are not compared between two spellings")
    if len(origins.form.atoms) != len(places.form.atoms):
        raise UnsupportedError(
            f"`{source.mcore}` is made of {', '.join(source.hf)} on one side and of {', '.join(target.hf)} on the "
            "other, which the table does not bring together"
        )
    filled = tuple(place.entry for place in places.hf)
    return Unit(source.mcore, moves(origins.hf, places.hf), filled, source.spec.shift - target.spec.shift)
