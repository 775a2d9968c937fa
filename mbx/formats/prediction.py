"""Which of a model's tensors are those of its prediction layers (MTP), which a model may be built without."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from converters.mcore.keys import bare
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.table import Row, Table

HEADS = "mtp_num_layers"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors of prediction layers that a model was built without. `copies`: those that repeat a tensor which it has,
    with its name; `tensors`: the others, all under Hugging Face's names."""

    tensors: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)


def rows_ahead(table: Table, fields: Mapping[str, Value], present: Collection[str] | None) -> list[Row]:
    """Rows of prediction layers in a folder with the tensors `present`, or all that it could have; `fields` is its
    Megatron Core config."""
    return [row for row in table.expand(environment(fields), present) if bare(row.site).startswith("mtp.")]


def left_out(
    table: Table, fields: Mapping[str, Value], built: Mapping[str, Value], present: Collection[str]
) -> LeftOut:
    """What a model of the config `built` has not, of the prediction layers that its folder has.

    `fields` is the folder's Megatron Core config, `present` its tensors.
    """
    held = {name for row in rows_ahead(table, built, present) for name in row.hf} if built.get(HEADS) else set()
    rows = rows_ahead(table, {**built, HEADS: fields.get(HEADS)}, present)
    copies = {row.hf[0]: row.same_as for row in rows if row.same_as in present and row.hf[0] in present}
    names = dict.fromkeys(name for row in rows for name in row.hf if name in present and name not in held)
    return LeftOut(
        tuple(name for name in names if name not in copies),
        {name: of for name, of in copies.items() if of is not None and name in names},
    )


def lie_beside(table: Table, fields: Mapping[str, Value], kept: Iterable[str], keys: Iterable[str]) -> frozenset[str]:
    """Those of `kept`, which travel beside a Megatron checkpoint of `keys`, that are of prediction layers.

    None where it has such layers: norms of these travel as they were stored.
    """
    present = frozenset(kept)
    if not present or any(bare(key).startswith("mtp.") for key in keys):
        return frozenset()
    return frozenset(name for row in rows_ahead(table, fields, present) for name in row.hf) & present
