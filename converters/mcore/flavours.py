"""Flavours: the same parameters, which each tool arranges in its own way.

Of a text model under Megatron Core's names a flavour is told by a key that it alone writes, and respells a table's
rows. What it only calls otherwise readers find under the usual names (`converters.mcore.keys`), and writers respell.
Where a model has towers, its table says under which keys each tool keeps them, and the keys tell the tool.
Sources: checkpoints of Megatron-Bridge 0.6.2 and of mcore-bridge 1.6.5, the models of ms-swift, compared with their
Hugging Face folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from converters.mcore.keys import inner_prefix
from converters.rows.table import RowSpec, Table
from converters.tensors import StoredTensor


@dataclass(frozen=True, slots=True)
class Flavour:
    """How a tool arranges parameters: `told_by` ends a key that shows it.

    `ops` are the ops by which rows of a table's are packed there, `unshifted` norms whose values are the folder's own.
    `builds` are the model types whose text model the tool has. There (param, op) of a row is what `renamed` says, and
    `wide` are parameters in fp32.
    """

    name: str
    told_by: str
    ops: Mapping[str, str] = field(default_factory=dict)
    unshifted: frozenset[str] = frozenset()
    builds: frozenset[str] = frozenset()
    renamed: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()

    def shows_in(self, keys: Collection[str]) -> bool:
        """Whether keys of a checkpoint are of this flavour."""
        return any(key.endswith(self.told_by) for key in keys)

    def has(self, table: Table) -> bool:
        """Whether the tool builds the text model of a table that has no towers."""
        return not table.flavours and not self.builds.isdisjoint(table.model_types)

    def respell(self, spec: RowSpec) -> RowSpec:
        """A row as this flavour packs it."""
        shift = 0 if spec.param in self.unshifted else spec.shift
        return replace(spec, op=self.ops.get(spec.op, spec.op), shift=shift)

    def written(self, spec: RowSpec) -> RowSpec:
        """A row as the tool itself stores it, names and dtypes included."""
        spec = self.respell(spec)
        param, op = self.renamed.get((spec.param, spec.op), (spec.param, spec.op))
        return replace(spec, param=param, op=op, dtype="F32" if spec.param in self.wide else spec.dtype)


#: mcore-bridge, the models of ms-swift. Its gated delta net has input projection and convolution whole, packed by key
#: head; each query head before its gate; the norm's weight as it is. Two of these look the same by name and shape.
#: Norms over all heads are whole in every rank, and a mixer's norm is a module of its own.
MCORE_BRIDGE = Flavour(
    "mcore-bridge",
    told_by=".self_attention.in_proj.weight",
    ops={
        "gdn_in": "gdn_in_by_head",
        "gdn_in_split": "gdn_in_split_by_head",
        "gdn_conv": "gdn_conv_by_head",
        "qgkv": "qgkv_by_head",
    },
    unshifted=frozenset({"self_attention.out_norm.weight"}),
    builds=frozenset(
        """deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe glm4_moe glm4_moe_lite glm_moe_dsa
        gpt_oss hy_v3 internlm3 kimi_k2 llama mimo minimax_m2 nemotron_h olmoe qwen2 qwen2_moe qwen3 qwen3_moe
        qwen3_next""".split()
    ),
    renamed={
        ("self_attention.q_layernorm.weight", "col"): ("self_attention.q_norm.weight", "norm"),
        ("self_attention.k_layernorm.weight", "col"): ("self_attention.k_norm.weight", "norm"),
        ("mixer.in_proj.layer_norm_weight", "norm"): ("norm.weight", "norm"),
    },
    wide=frozenset({"self_attention.core_attention.softmax_offset", "mixer.A_log", "mixer.D"}),
)
FLAVOURS = (MCORE_BRIDGE,)
#: What a checkpoint with towers is written as: Megatron-Bridge's arrangement since its release 0.6.
USUAL = "bridge"
#: The text model alone, as if nothing were around it; the towers' tensors travel beside it as they are.
TEXT_ALONE = "text"

#: Parameters that some tools keep in fp32 whatever the folder has, by the end of their names.
_OFTEN_FP32 = ("core_attention.softmax_offset", "A_log", "mixer.D", "dt_bias", "router.expert_bias")


def in_flavour(table: Table, name: str) -> Table:
    """`table` as a checkpoint of the flavour `name` is to be written; UsageError where it knows none of that name.

    A text model that no tool but the usual one builds has the usual flavour alone.
    """
    tool = next((flavour for flavour in FLAVOURS if flavour.name == name), None)
    alone = tool is not None and tool.has(table)
    if name != TEXT_ALONE and (table.flavours or not alone and name != USUAL):
        table = table.in_flavour(name)
    return table if tool is None else _respelt(table, tool.written, tool.name)


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
        for site in (*table.towers, *table.sites)
        if site.outer or site.name in own.sites and site in table.towers
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
    found = next((flavour for flavour in FLAVOURS if flavour.shows_in(tensors)), None)
    wide = [name for name, tensor in tensors.items() if tensor.dtype == "F32"]
    beside = any(tensor.dtype in ("BF16", "F16") for tensor in tensors.values())
    promoted = tuple({end for end in _OFTEN_FP32 if beside and any(name.endswith(end) for name in wide)})

    def respell(spec: RowSpec) -> RowSpec:
        spec = spec if found is None else found.respell(spec)
        return replace(spec, dtype="F32") if spec.param.endswith(promoted) else spec

    table = _respelt(table, respell, table.flavour if found is None else found.name)
    return table if found is None else replace(table, unsupported=_unsupported(found))


def _respelt(table: Table, respell: Callable[[RowSpec], RowSpec], flavour: str) -> Table:
    """`table` with its rows as `respell` makes them, which are then of `flavour`; itself where that changes none."""
    blocks = {name: tuple(tuple(map(respell, row)) for row in rows) for name, rows in table.blocks.items()}
    if blocks == dict(table.blocks):
        return table
    return replace(table, blocks=blocks, flavour=flavour)


def _unsupported(found: Flavour) -> str:
    """Why Megatron Core's own model cannot hold a checkpoint that a flavour's key shows in."""
    return f"The checkpoint arranges its gated delta net as {found.name} does, Megatron Core otherwise."
