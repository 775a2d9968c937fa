"""What travels beside a Megatron checkpoint, as a comparison takes it: by its names in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.engine.plan import Draft, Plan
from converters.errors import MbxError
from converters.mcore.keys import bare
from converters.planning.pairing import same_units
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import config_file, kept_tensors
from mbx.formats.prediction import lie_beside, rows_ahead
from mbx.tables import table_for


def carried_by(checkpoint: Checkpoint, beside: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Of the tensors `beside` the folder's text model (a vision tower), those that travel with the checkpoint."""
    kept = {} if checkpoint.hf is None or not beside else kept_tensors(checkpoint.home, checkpoint.hf)
    return {name: kept[name] for name in beside if name in kept}


def ahead_of(checkpoint: Checkpoint, table: Table, fields: Mapping[str, Value]) -> tuple[str, ...]:
    """Tensors of prediction layers that a Megatron checkpoint was built without, and that travel with it."""
    kept = {} if checkpoint.hf is None else kept_tensors(checkpoint.home, checkpoint.hf)
    return tuple(sorted(lie_beside(table, fields, kept, checkpoint.tensors)))


def heads_of(table: Table, plan: Plan) -> tuple[str, ...]:
    """The folder's tensors of prediction layers that an import of it takes, but for those that repeat others."""
    rows = rows_ahead(table, plan.config, plan.sources)
    return tuple(name for row in rows if not (row.spec.drop or row.same_as) for name in row.hf if name in plan.sources)


def without_heads(plan: Plan) -> Plan:
    """`plan` that makes no prediction layers."""
    drafts = tuple(draft for draft in plan.drafts if not bare(draft.name).startswith("mtp."))
    made = {draft.name for draft in drafts}
    units = tuple(unit for unit in plan.units if all(entry.tensor in made for entry in unit.entries))
    return replace(plan, drafts=drafts, units=units)


def with_carried(plan: Plan, carried: Mapping[str, StoredTensor]) -> Plan:
    """`plan` that also makes what travels with a checkpoint, as it is."""
    own = [plan.sources[name] for name in carried]
    units = [unit for tensor in own for unit in same_units(tensor, carried[tensor.name], 0)]
    drafts = tuple(Draft(tensor.name, tensor.dtype, tensor.shape, ()) for tensor in own)
    return replace(plan, drafts=(*plan.drafts, *drafts), units=(*plan.units, *units))


def beside_of(checkpoint: Checkpoint, mapping: str | None) -> dict[str, StoredTensor]:
    """Tensors of a model around the text model (a vision tower), and of prediction layers that it was built without,
    that travel with a Megatron checkpoint."""
    config = config_file(checkpoint)
    if config is None or checkpoint.hf is None:
        return {}
    try:
        table = table_for(config, mapping)
        fields = table.config.to_mcore(config, allow_unused=config)
    except MbxError:
        return {}
    kept, ahead = kept_tensors(checkpoint.home, checkpoint.hf), ahead_of(checkpoint, table, fields)
    return {name: tensor for name, tensor in kept.items() if table.travels(name) or name in ahead}
