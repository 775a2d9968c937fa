"""Tensors kept beside a Megatron checkpoint, held against the folder that it came from as that was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converters.engine.plan import FLOATS, Plan
from converters.errors import StorageError
from converters.planning.exporter import HfTensor
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats.hf import KEPT, kept_tensors
from mbx.formats.prediction import rows_ahead
from mbx.text import plural


def fitting_kept(
    iteration: Path, reference: Path | None, recorded: Mapping[str, HfTensor] | None
) -> dict[str, StoredTensor]:
    """What lies beside a checkpoint as KEPT in `reference`, files named from `iteration`; empty without a file.

    `recorded` are the tensors of the folder that it came from, decoded; without them nothing is compared. A run may
    keep floats in another float dtype, as those that it began from. StorageError for anything else that is not there.
    """
    kept = {} if reference is None else kept_tensors(iteration, reference)
    if recorded is None:
        return kept
    for name, tensor in kept.items():
        known = recorded.get(name)
        if known is None:
            fact = "a tensor that the folder it came from had not"
        elif tensor.shape != known.shape:
            fact = f"of shape {list(tensor.shape)}; the folder it came from had {list(known.shape)}"
        elif tensor.dtype != known.dtype and not {tensor.dtype, known.dtype} <= FLOATS:
            fact = f"{tensor.dtype}; the folder it came from had {known.dtype}"
        else:
            continue
        raise StorageError(f"`{KEPT}` beside `{iteration}` holds `{name}`, {fact}", hint=_RESTORE)
    return kept


_RESTORE = f"put the checkpoint's own `{KEPT}` back, or convert the folder again"


def not_written(
    plan: Plan, config: Mapping[str, Value], recorded: Mapping[str, HfTensor], kept: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """In words, the prediction layers and parts around the model that the folder had and an export cannot write.

    `config` is the folder's. StorageError where the `kept` tensors are some of theirs: a model with a half of them is
    none that anything made.
    """
    table = plan.table
    if table is None or not plan.ledger.dropped:
        return ()
    fields = table.config.to_mcore(config, allow_unused=config)
    ahead = {
        name for row in rows_ahead(table, fields, recorded) if not (row.spec.drop or row.same_as) for name in row.hf
    }
    beside = {name for name in recorded if table.travels(name)} - ahead
    notes = []
    for what, names in (("prediction layers", ahead), ("what stands beside the model", beside)):
        lost = [name for name in plan.ledger.dropped if name in names]
        if not lost:
            continue
        if any(name in names for name in kept):
            raise StorageError(
                f"`{KEPT}` lacks {plural(len(lost), 'tensor')} of {what}, first `{lost[0]}`", hint=_RESTORE
            )
        notes.append(
            f"not written: {what}, {plural(len(lost), 'tensor')}, first `{lost[0]}`; they are not in the "
            "checkpoint nor kept beside it, and config.json still speaks of them"
        )
    return tuple(notes)
