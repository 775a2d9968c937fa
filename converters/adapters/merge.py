"""Which entries of a plan's target an adapter updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from converters.adapters.sites import Adapted, is_weight
from converters.engine.lowrank import LowRank, Part
from converters.engine.plan import Draft, Plan, Unit, as_it_is
from converters.engine.regions import matrix
from converters.errors import CoverageError, UnsupportedError
from converters.planning.join import Joiner, Place
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import Shape, StoredTensor

#: Tensor and entry of its leading dimensions.
Spot = tuple[str, Shape]


def updates_of(
    table: Table,
    config: Mapping[str, Value],
    adapted: Sequence[Adapted],
    scales: Mapping[Spot, float],
    targets: Mapping[str, Shape],
    *,
    megatron: bool,
) -> dict[Spot, LowRank]:
    """The update of each entry of a target, whose tensors have the shapes `targets`.

    `scales` are by the name and the entry of B. The target has torch_dist keys where `megatron`, else Hugging Face
    names. Raises CoverageError for an adapter of a weight that the target does not hold, or holds in another shape.
    """
    joiner = Joiner.at(table, config)
    expanded = table.expand(joiner.env, None if megatron else targets)
    rows = {row.mcore.removeprefix(table.prefix): row for row in expanded if is_weight(row)}
    updates: dict[Spot, tuple[list[Part], bool]] = {}
    for found in adapted:
        row = rows.get(found.row.mcore.removeprefix(table.prefix), found.row)
        joined = joiner.join(row, found.form.mcore_pack().rows, keys=joiner.homes(row, targets))
        if joined.form.columns:
            raise UnsupportedError(
                f"`{row.mcore}` (op {row.spec.op}) is not merged: halves of its columns are swapped"
            )
        if megatron and any(place.tensor not in targets for place in joined.mcore):
            raise CoverageError(f"the adapter updates `{row.mcore}`, which the base does not hold")
        for place in joined.mcore if megatron else joined.hf:
            for atom, slot in place.slots.items():
                if (site := found.site_of(atom)) is not None:
                    _check(place, targets, site.inputs)
                    parts, _ = updates.setdefault((place.tensor, place.index), ([], place.transposed))
                    parts.append(Part(atom, slot, site, scales[site.b, site.index]))
    return {spot: LowRank(tuple(parts), transposed) for spot, (parts, transposed) in updates.items()}


def _check(place: Place, targets: Mapping[str, Shape], inputs: int) -> None:
    """CoverageError unless an entry has the shape of its update; behind a vocabulary there may be padding."""
    name, wanted = place.tensor, (inputs, place.rows) if place.transposed else (place.rows, inputs)
    if name not in targets:
        raise CoverageError(f"the adapter updates `{name}`, which the base does not hold")
    got = matrix(targets[name], len(place.index))
    padded = name == "output_layer.weight" and got[0] > place.rows
    if got[1] != wanted[1] or not (padded or got[0] == wanted[0]):
        raise CoverageError(f"`{name}` is {list(got)}; the adapter updates a matrix of {list(wanted)}")


def plan_copy(
    table: Table,
    config: Mapping[str, Value],
    tensors: Mapping[str, StoredTensor],
    updates: Mapping[Spot, LowRank],
    origins: Mapping[str, StoredTensor],
) -> Plan:
    """Plan that writes the Hugging Face tensors `tensors`, read where they lie or from `origins`.

    Tensors without an update move as bytes; one whose entries are updated apart is carried entry by entry.
    """
    drafts, units = [], list[Unit]()
    depths = {name: len(index) for name, index in updates}
    for name, tensor in tensors.items():
        drafts.append(Draft.whole(name, tensor.dtype, tensor.shape))
        depth = depths.get(name, 0)
        units += as_it_is(origins.get(name, tensor).name, name, tensor.shape[:depth], matrix(tensor.shape, depth)[0])
    kept = {name: tensor for name, tensor in tensors.items() if name not in origins}
    used = kept | {tensor.name: tensor for tensor in origins.values()}
    changed = [(origin.dtype, tensors[name].dtype) for name, origin in origins.items()]
    return replace(
        Plan.of_all("merge", config, used, drafts, units, table=table),
        updates=updates,
        dtype_changes=Counter(pair for pair in changed if pair[0] != pair[1]),
    )
