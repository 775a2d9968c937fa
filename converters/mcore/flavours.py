"""Flavours: the same parameters, which each tool arranges in its own way.

Of a text model under Megatron Core's names a flavour is told by a key that it alone writes, and respells a table's
rows. Where a model has towers, its table says under which keys each tool keeps them, and the keys tell the tool.
Sources: checkpoints of Megatron-Bridge 0.6.2 and of mcore-bridge 1.6.5, the models of ms-swift, compared with their
Hugging Face folders.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from converters.mcore.keys import inner_prefix
from converters.rows.table import RowSpec, Table
from converters.tensors import StoredTensor


@dataclass(frozen=True, slots=True)
class Flavour:
    """How a tool arranges parameters: `told_by` ends a key that shows it.

    `ops` are the ops by which rows of a table's are packed there, `unshifted` norms whose values are the folder's own.
    """

    name: str
    told_by: str
    ops: Mapping[str, str] = field(default_factory=dict)
    unshifted: frozenset[str] = frozenset()

    def shows_in(self, keys: Collection[str]) -> bool:
        """Whether keys of a checkpoint are of this flavour."""
        return any(key.endswith(self.told_by) for key in keys)

    def changes(self, table: Table) -> bool:
        """Whether a table has rows that this flavour arranges otherwise."""
        return any(spec.op in self.ops for rows in table.blocks.values() for row in rows for spec in row)

    def respell(self, spec: RowSpec) -> RowSpec:
        """A row as this flavour has it."""
        shift = 0 if spec.param in self.unshifted else spec.shift
        return replace(spec, op=self.ops.get(spec.op, spec.op), shift=shift)


#: The gated delta net of mcore-bridge: its input projection and convolution whole, packed by key head; each query head
#: before its gate; the norm's weight as it is. Two of these look the same by name and shape.
DELTA_NET_BY_HEAD = Flavour(
    "mcore-bridge",
    told_by=".self_attention.in_proj.weight",
    ops={
        "gdn_in": "gdn_in_by_head",
        "gdn_in_split": "gdn_in_split_by_head",
        "gdn_conv": "gdn_conv_by_head",
        "qgkv": "qgkv_by_head",
    },
    unshifted=frozenset({"self_attention.out_norm.weight"}),
)
FLAVOURS = (DELTA_NET_BY_HEAD,)
#: What a checkpoint with towers is written as: Megatron-Bridge's arrangement since its release 0.6.
USUAL = "bridge"
#: The text model alone, as if nothing were around it; the towers' tensors travel beside it as they are.
TEXT_ALONE = "text"

#: Parameters that some tools keep in fp32 whatever the folder has, by the end of their names.
_OFTEN_FP32 = ("core_attention.softmax_offset", "A_log", "mixer.D", "dt_bias", "router.expert_bias")


def in_flavour(table: Table, name: str) -> Table:
    """`table` as a checkpoint of the flavour `name` is to be written; UsageError where it knows none of that name.

    A text model that no tool arranges otherwise has the usual flavour alone.
    """
    found = [flavour for flavour in FLAVOURS if flavour.name == name and flavour.changes(table)]
    if name != TEXT_ALONE and (table.flavours or not found and name != USUAL):
        table = table.in_flavour(name)
    return _respelt(table, found, frozenset())


def usual_of(table: Table) -> str:
    """The flavour that is written where none is asked for: the usual one, or the first of a table that lacks it."""
    return USUAL if USUAL in table.flavours or not table.flavours else next(iter(table.flavours))


def arranged(table: Table, keys: Collection[str]) -> Table:
    """`table` in the flavour whose names explain all that stands beside the text model among `keys`.

    The flavour that says most of the names counts; the first one where none explains all. Without anything around the
    text model it stays the table of that alone.
    """
    prefix = next(filter(None, map(inner_prefix, keys)), None)
    if prefix is None or not table.flavours:
        return table
    towers = [key for key in keys if not inner_prefix(key)]
    said = {name: _explained(table, name, towers) for name, own in table.flavours.items() if own.prefix == prefix}
    return table.in_flavour(max(said or table.flavours, key=lambda name: said.get(name, -1)))


def _explained(table: Table, flavour: str, keys: Iterable[str]) -> int:
    """Characters of `keys` that a flavour's names spell out; -1 where it has no name for some key."""
    own = table.arrangement(flavour)
    exact = [
        re.compile(re.sub(r"\\\{[IL]\\\}\\\.", r"(?:\\d+\\.)?", re.escape(site.mcore + row[0].param)))
        for site in table.towers
        if site.name in own.sites
        for block in site.blocks
        for row in table.blocks[block]
    ]
    total = 0
    for key in keys:
        whole = any(name.fullmatch(key) for name in exact)
        length = len(key) if whole else max((len(at) for at in own.kept.values() if key.startswith(at)), default=0)
        if not length:
            return -1
        total += length
    return total


def flavoured(table: Table, tensors: Mapping[str, StoredTensor]) -> Table:
    """`table` with its rows as the checkpoint that holds `tensors` has them; itself where that is the usual way.

    Parameters that it holds in fp32 beside others in 16 bits are read by value, and get their dtype back on export.
    """
    table = arranged(table, tensors)
    wide = [name for name, tensor in tensors.items() if tensor.dtype == "F32"]
    beside = any(tensor.dtype in ("BF16", "F16") for tensor in tensors.values())
    promoted = {end for end in _OFTEN_FP32 if beside and any(name.endswith(end) for name in wide)}
    return _respelt(table, [flavour for flavour in FLAVOURS if flavour.shows_in(tensors)], frozenset(promoted))


def _respelt(table: Table, found: list[Flavour], promoted: frozenset[str]) -> Table:
    """`table` with its rows as flavours have them, and in fp32 those whose names end as one of `promoted`."""
    if not promoted and not found:
        return table

    def respelt(spec: RowSpec) -> RowSpec:
        for flavour in found:
            spec = flavour.respell(spec)
        return replace(spec, dtype="F32") if spec.param.endswith(tuple(promoted)) else spec

    blocks = {name: tuple(tuple(map(respelt, row)) for row in rows) for name, rows in table.blocks.items()}
    if blocks == dict(table.blocks):
        return table
    return replace(table, blocks=blocks, unsupported=_unsupported(found) or table.unsupported)


def _unsupported(found: list[Flavour]) -> str:
    """Why Megatron Core's own model cannot hold a checkpoint of these flavours."""
    if not found:
        return ""
    names = " and ".join(flavour.name for flavour in found)
    return f"The checkpoint arranges its gated delta net as {names} does, Megatron Core otherwise."
