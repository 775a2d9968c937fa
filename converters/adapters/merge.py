"""Which entries of a plan's target an adapter updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import product

from converters.adapters.sites import Adapted, is_weight
from converters.engine.lowrank import LowRank, Part
from converters.engine.plan import Draft, Entry, Plan, Unit, row_form
from converters.engine.regions import Move, Region, matrix
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.layout import Layout
from converters.mcore.torch_dist import Home, homes
from converters.rows.config_map import environment
from converters.rows.coverage import Ledger
from converters.rows.expr import Value
from converters.rows.pack import Slot
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

#: Tensor and entry of its leading dimensions.
Place = tuple[str, Shape]


def updates_of(
    table: Table,
    config: Mapping[str, Value],
    adapted: Sequence[Adapted],
    scales: Mapping[Place, float],
    targets: Mapping[str, Shape],
    *,
    megatron: bool,
) -> dict[Place, LowRank]:
    """The update of each entry of a target, whose tensors have the shapes `targets`.

    `scales` are by the name and the entry of B. The target has torch_dist keys where `megatron`, else Hugging Face
    names. Raises CoverageError for an adapter of a weight that the target does not hold, or holds in another shape.
    """
    env = environment(config)
    dims, layers, experts = table.dims_at(env), table.num_layers(env), table.num_experts(env)
    rows = {row.mcore: row for row in table.expand(env, None if megatron else targets) if is_weight(row)}
    parts: dict[Place, list[Part]] = {}
    turned: dict[Place, bool] = {}
    for found in adapted:
        row = rows.get(found.row.mcore, found.row)
        total = found.form.mcore_pack().rows
        form = row_form(row, dims, total)
        if form.columns:
            raise UnsupportedError(
                f"`{row.mcore}` (op {row.spec.op}) is not merged: halves of its columns are swapped"
            )
        places: list[tuple[Place, dict[int, Slot], bool]] = []
        if megatron:
            for home in _present(row, layers, experts, targets):
                atoms = form.order() if home.atoms is None else home.atoms
                rows_of = form.mcore_pack().slots()
                if home.atoms is not None:
                    rows_of = tuple(Slot.whole(form.atoms[atom]) for atom in atoms)
                places.append(((home.key, home.index), dict(zip(atoms, rows_of, strict=True)), False))
        else:
            stacked = row.spec.stacked and row.expert is not None
            for name, pack, (_, members) in zip(row.hf, form.hf_packs(), form.hf, strict=True):
                index = (row.expert,) if stacked and row.expert is not None else ()
                places.append(((name, index), dict(zip(members, pack.slots(), strict=True)), row.spec.transpose))
        for place, slots, transposed in places:
            for atom, slot in slots.items():
                if (site := found.site_of(atom)) is not None:
                    _check(place, targets, site.inputs, sum(slot.rows for slot in slots.values()), transposed)
                    parts.setdefault(place, []).append(Part(atom, slot, site, scales[site.b, site.index]))
                    turned[place] = transposed
    return {place: LowRank(tuple(held), turned[place]) for place, held in parts.items()}


def _present(row: Row, layers: int, experts: int, targets: Collection[str]) -> tuple[Home, ...]:
    for stacked in (True, False):
        found = homes(row, stacked, layers, experts)
        if all(home.key in targets for home in found):
            return found
    raise CoverageError(f"the adapter updates `{row.mcore}`, which the base does not hold")


def _check(place: Place, targets: Mapping[str, Shape], inputs: int, rows: int, transposed: bool) -> None:
    """CoverageError unless an entry has the shape of its update; behind a vocabulary there may be padding."""
    name, index = place
    if name not in targets:
        raise CoverageError(f"the adapter updates `{name}`, which the base does not hold")
    got, wanted = matrix(targets[name], len(index)), (inputs, rows) if transposed else (rows, inputs)
    padded = name == "output_layer.weight" and got[0] > rows
    if got[1] != wanted[1] or not (padded or got[0] == wanted[0]):
        raise CoverageError(f"`{name}` is {list(got)}; the adapter updates a matrix of {list(wanted)}")


def plan_copy(
    table: Table,
    config: Mapping[str, Value],
    sources: Mapping[str, StoredTensor],
    updates: Mapping[Place, LowRank],
    replaced: Mapping[str, StoredTensor],
) -> Plan:
    """Plan that writes Hugging Face tensors under their own names; `replaced` take their values from other tensors.

    Tensors without an update move as bytes; one whose entries are updated apart is carried entry by entry. Raises
    CoverageError where a replacement has no counterpart, or another shape.
    """
    if unknown := [name for name in replaced if name not in sources]:
        raise CoverageError(f"the adapter replaces `{unknown[0]}`, which the base does not hold", details=unknown)
    drafts, units = [], []
    depths = {name: len(index) for name, index in updates}
    for name, tensor in sources.items():
        drafts.append(Draft(name, tensor.dtype, tensor.shape, ((0, tuple(0 for _ in tensor.shape), tensor.shape),)))
        origin, depth = replaced.get(name, tensor), depths.get(name, 0)
        if origin.shape != tensor.shape:
            raise CoverageError(f"`{name}` is {list(tensor.shape)}, and the adapter's own {list(origin.shape)}")
        slot = Slot.whole(matrix(tensor.shape, depth)[0])
        for index in product(*map(range, tensor.shape[:depth])):
            move = Move(Region(origin.name, index, slot), Region(name, index, slot))
            units.append(Unit(name, (move,), (Entry(name, index),)))
    kept = {name: tensor for name, tensor in sources.items() if name not in replaced}
    return Plan(
        direction="merge",
        table=table,
        config=config,
        layout=Layout(),
        sources=kept | {tensor.name: tensor for tensor in replaced.values()},
        drafts=tuple(drafts),
        units=tuple(units),
        ledger=Ledger(consumed=len(sources), produced=len(drafts)),
        updates=updates,
        dtype_changes=Counter(
            (origin.dtype, sources[n].dtype) for n, origin in replaced.items() if origin.dtype != sources[n].dtype
        ),
    )
