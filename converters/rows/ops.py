"""The closed vocabulary of ops: how Hugging Face tensors and one Megatron Core tensor share atoms.

An op names its atoms, says how many repeats (`groups`) each Hugging Face tensor and the Megatron Core
tensor arrange them in, and which dimension of an atom tensor parallelism cuts. Both directions and every
layout follow; nothing here is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from converters.errors import CoverageError, TableError
from converters.rows.pack import Pack

Dims = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Form:
    """An op at given dims.

    `atoms`: rows of each atom. `hf`: for each Hugging Face tensor, its repeats and the atoms it holds.
    `mcore_groups`: repeats in the Megatron Core tensor. `mcore_order`: atom order there.
    `cut`: dimension of an atom that tensor parallelism cuts, or None where every rank holds all.
    `columns`: row blocks are halves of the columns (dimension 1), not of the rows. `times`: how many rows of an atom
    each row of a Hugging Face tensor stands for, by the tensor's number, where that is not one.
    """

    atoms: tuple[int, ...]
    hf: tuple[tuple[int, tuple[int, ...]], ...]
    mcore_groups: int = 1
    mcore_order: tuple[int, ...] | None = None
    cut: int | None = None
    columns: bool = False
    times: Mapping[int, int] = field(default_factory=dict)

    def order(self) -> tuple[int, ...]:
        """Atoms in the order the Megatron Core tensor repeats them."""
        return self.mcore_order or tuple(range(len(self.atoms)))

    def hf_packs(self) -> tuple[Pack, ...]:
        """Row layout of each Hugging Face tensor."""
        packs = []
        for number, (groups, members) in enumerate(self.hf):
            times = self.times.get(number, 1)
            packs.append(Pack(groups, tuple(_share(self.atoms[i], groups * times) for i in members), times))
        return tuple(packs)

    def mcore_pack(self) -> Pack:
        """Row layout of the Megatron Core tensor."""
        return Pack(self.mcore_groups, tuple(_share(self.atoms[i], self.mcore_groups) for i in self.order()))


def _share(rows: int, groups: int) -> int:
    if groups < 1 or rows % groups:
        raise CoverageError(f"{rows} rows cannot be laid out in {groups} equal groups")
    return rows // groups


def _parts(rows: int, count: int) -> tuple[int, ...]:
    return (_share(rows, count),) * count


def _side_by_side(first: int, both: int) -> tuple[int, int]:
    if not 0 < first < both:
        raise CoverageError(f"{both} columns are not {first} and some more")
    return first, both - first


def _each(count: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((1, (i,)) for i in range(count))


def _qkv_atoms(d: Dims) -> tuple[int, int, int]:
    value_dim = d.get("v_head_dim", d["head_dim"])
    return d["heads"] * d["head_dim"], d["groups"] * d["head_dim"], d["groups"] * value_dim


def _gdn_atoms(d: Dims) -> tuple[int, ...]:
    key, value, heads = d["gdn_k_heads"] * d["gdn_k_dim"], d["gdn_v_heads"] * d["gdn_v_dim"], d["gdn_v_heads"]
    return key, key, value, value, heads, heads


def _mamba_atoms(d: Dims) -> tuple[int, ...]:
    return d["ssm_inner"], d["ssm_inner"], d["ssm_bc"], d["ssm_bc"], d["ssm_heads"]


def _gated_by_head(d: Dims, rows: int) -> Form:
    """Atoms: the queries and the gates of each head in its group in turn, then keys and values."""
    query, key, value = _qkv_atoms(d)
    in_group = _share(d["heads"], d["groups"])
    pairs = (_share(query, in_group),) * (2 * in_group)
    count = len(pairs)
    held = ((d["groups"], tuple(range(count))), (1, (count,)), (1, (count + 1,)))
    return Form((*pairs, key, value), held, d["groups"], cut=0)


def _gated_by_a_row(d: Dims, rows: int) -> Form:
    """Atoms: queries, the gates of each head in its group, keys, values; a gate is one row for all of its head."""
    query, key, value = _qkv_atoms(d)
    in_group = _share(d["heads"], d["groups"])
    gates = tuple(range(1, 1 + in_group))
    atoms = (query, *_parts(query, in_group), key, value)
    held = ((1, (0,)), (d["groups"], gates), (1, (1 + in_group,)), (1, (2 + in_group,)))
    return Form(atoms, held, d["groups"], cut=0, times={1: d["head_dim"]})


def _by_key_head(op: str) -> Callable[[Dims, int], Form]:
    """An op of the gated delta net whose Megatron Core tensor repeats all atoms for each key head."""
    return lambda d, rows: replace(OPS[op](d, rows), mcore_groups=d["gdn_k_heads"])


def _one(cut: int | None) -> Callable[[Dims, int], Form]:
    return lambda d, rows: Form((rows,), _each(1), cut=cut)


#: Op name → the form it takes at `dims` when the Megatron Core tensor has `rows` rows without padding.
OPS: dict[str, Callable[[Dims, int], Form]] = {
    # one tensor to one: replicated, cut by rows (column-parallel), cut by columns (row-parallel)
    "copy": _one(None),
    "norm": _one(None),
    "col": _one(0),
    "row": _one(1),
    # embeddings and output layers: cut by rows, padded to what the layout asks for
    "vocab": lambda d, rows: Form((d["vocab"],), _each(1), cut=0),
    # one number a head, behind which the Hugging Face tensor goes on with zeros (Kimi K3)
    "unpadded": lambda d, rows: Form((d["kda_heads"],), _each(1), cut=0),
    # gated MLP: gate and up apart, stacked in one tensor, or interleaved row by row (GPT-OSS)
    "glu": lambda d, rows: Form(_parts(rows, 2), _each(2), cut=0),
    "glu_fused": lambda d, rows: Form(_parts(rows, 2), ((1, (0, 1)),), cut=0),
    "glu_zip": lambda d, rows: Form(_parts(rows, 2), ((rows // 2, (0, 1)),), cut=0),
    # attention: Megatron Core repeats [queries of the group | key | value] per query group
    "qkv": lambda d, rows: Form(_qkv_atoms(d), _each(3), d["groups"], cut=0),
    # attention to a text: queries stand apart
    "kv": lambda d, rows: Form(_qkv_atoms(d)[1:], _each(2), d["groups"], cut=0),
    "qkv_fused": lambda d, rows: Form(_qkv_atoms(d), ((1, (0, 1, 2)),), d["groups"], cut=0),
    # the same where each layer has its own number of groups (heterogeneous blocks): the rows tell it
    "qkv_own": lambda d, rows: OPS["qkv"]({**d, "groups": (rows // max(1, d["head_dim"]) - d["heads"]) // 2}, rows),
    # attention with an output gate: q_proj holds [query | gate] per head (Qwen3-Next, Qwen3.5)
    "qgkv": lambda d, rows: Form(
        (d["heads"] * d["head_dim"],) * 2 + _qkv_atoms(d)[1:],
        ((d["heads"], (0, 1)), (1, (2,)), (1, (3,))),
        d["groups"],
        cut=0,
    ),
    # the same with a gate a head: each of its rows repeated over the head (Step-3.5 in Megatron-Bridge)
    "qgkv_spread": _gated_by_a_row,
    # gated delta net: atoms query, key, value, z, beta, alpha
    "gdn_in": lambda d, rows: Form(
        _gdn_atoms(d), ((d["gdn_k_heads"], (0, 1, 2, 3)), (d["gdn_k_heads"], (4, 5))), cut=0
    ),
    "gdn_in_split": lambda d, rows: Form(_gdn_atoms(d), ((1, (0, 1, 2)), (1, (3,)), (1, (4,)), (1, (5,))), cut=0),
    "gdn_conv": lambda d, rows: Form(_gdn_atoms(d)[:3], ((1, (0, 1, 2)),), cut=0),
    # the same in whole tensors, packed by head (the flavour of mcore-bridge)
    "gdn_in_by_head": _by_key_head("gdn_in"),
    "gdn_in_split_by_head": _by_key_head("gdn_in_split"),
    "gdn_conv_by_head": _by_key_head("gdn_conv"),
    "qgkv_by_head": _gated_by_head,
    # Mamba-2: atoms z, x, B, C, dt; the convolution sees x, B, C
    "mamba_in": lambda d, rows: Form(_mamba_atoms(d), ((1, (0, 1, 2, 3, 4)),), cut=0),
    "mamba_conv": lambda d, rows: Form(_mamba_atoms(d)[1:4], ((1, (0, 1, 2)),), cut=0),
    # two tensors side by side in one: the columns behind attention's heads, and those behind the MLP (FLUX)
    "row_pair": lambda d, rows: Form(_side_by_side(d["heads"] * d["head_dim"], rows), ((1, (0, 1)),), cut=1),
    # halves of the columns exchanged, rows cut (MiMo's multi-token-prediction input projection)
    "col_swap": lambda d, rows: Form((rows, rows), ((rows, (0, 1)),), rows, (1, 0), cut=0, columns=True),
}

#: Ops whose atoms are columns of the tensors on both sides, and whose Megatron Core parameters are one an atom.
ACROSS = frozenset(("row_pair",))
#: Names that each fused op gives its atoms where a format stores them apart.
ATOM_NAMES: dict[str, tuple[str, ...]] = {
    "gdn_in": ("query", "key", "value", "z", "beta", "alpha"),
    "gdn_in_split": ("query", "key", "value", "z", "beta", "alpha"),
    "gdn_conv": ("query", "key", "value"),
    "mamba_in": ("z", "x", "B", "C", "dt"),
    "mamba_conv": ("x", "B", "C"),
}


def form(op: str, dims: Dims, rows: int) -> Form:
    """The form of `op` for a Megatron Core tensor of `rows` unpadded rows; TableError on a missing dim."""
    try:
        return OPS[op](dims, rows)
    except KeyError as error:
        if error.args[0] == op:
            raise TableError(f"unknown op `{op}`", hint=f"ops are: {', '.join(sorted(OPS))}") from error
        raise TableError(f"op `{op}` needs `{error.args[0]}` in [dims]") from error
