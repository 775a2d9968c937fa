"""Where a format keeps the two factors of a low-rank update, and which atoms of the weight they update.

The update of a weight `W: [out, in]` is `scale · B A` with `A: [r, in]` and `B: [out, r]` (arXiv 2106.09685), so B
shares W's rows and A its columns: what a table's row says of W's rows holds for B's. DoRA adds one magnitude a row,
`m: [out]` (arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from converters.engine.lowrank import Site
from converters.engine.plan import row_form
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.keys import HEAD
from converters.rows.ops import Dims, Form
from converters.rows.pack import Slot
from converters.rows.table import Row, Table

#: Names of the parts of a fused weight that Megatron-Bridge's CanonicalLoRA adapts apart (peft/canonical_lora.py).
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("adapter_q", "adapter_k", "adapter_v"),
    "qkv_own": ("adapter_q", "adapter_k", "adapter_v"),
    "qgkv": ("adapter_q", "adapter_k", "adapter_v"),
    "glu": ("adapter_gate", "adapter_up"),
    # no class of Megatron-Bridge's cuts these: named in the same way
    "gdn_in": ("adapter_qkvz", "adapter_ba"),
    "gdn_in_split": ("adapter_qkv", "adapter_z", "adapter_b", "adapter_a"),
}
#: Ops whose weight is one Megatron Core linear with an adapter of its own.
ADAPTABLE = frozenset((*MEMBERS, "copy", "col", "row", "glu_fused", "glu_zip", "qkv_fused", "mamba_in"))
#: Ops whose sizes the config says, whatever is adapted.
SIZED = ("qkv", "qgkv", "gdn_in", "gdn_in_split", "mamba_in")


@dataclass(frozen=True, slots=True)
class Adapted:
    """A weight with its adapters: `row` spells the weight as the adapter's names do."""

    row: Row
    form: Form
    sites: tuple[Site, ...]

    def site_of(self, atom: int) -> Site | None:
        """The site that updates an atom, None where none does."""
        return next((site for site in self.sites if atom in site.atoms), None)

    def modules_of(self, row: Row, site: Site) -> tuple[str, ...]:
        """Modules or parameters of the base that a site adapts, as `row` spells the weight."""
        if len(row.hf) == 1:
            return (row.hf[0].removesuffix(".weight"),)
        same = len(self.form.hf) == len(
            row.hf
        )  # else the row has an atom a tensor, and the adapter's own had them all
        members = [atoms for _, atoms in self.form.hf] if same else [(atom,) for atom in range(len(row.hf))]
        named = zip(row.hf, members, strict=True)
        return tuple(name.removesuffix(".weight") for name, atoms in named if set(atoms) & set(site.atoms))


def spellings(table: Table, row: Row) -> list[Row]:
    """The row, and its alternatives in the table: experts apart, or all in one tensor."""
    found = [row]
    for alternatives in (rows for block in table.blocks.values() for rows in block):
        if row.spec not in alternatives:
            continue
        tail = row.spec.hf[0].replace("{E}", str(row.expert))
        if not row.hf[0].endswith(tail):
            return found
        prefix = row.hf[0][: len(row.hf[0]) - len(tail)]
        for spec in alternatives:
            if spec != row.spec and spec.when == row.spec.when and not (spec.drop or spec.same_as):
                names = tuple(prefix + name.replace("{E}", str(row.expert)) for name in spec.hf)
                found.append(replace(row, spec=spec, hf=names))
    return found


def is_adaptable(row: Row) -> bool:
    """Whether Megatron Core has one linear with an adapter of its own for the row's weight; of a vocabulary's weights
    that is the output layer alone."""
    return row.spec.op in ADAPTABLE or row.spec.param == HEAD


def is_weight(row: Row) -> bool:
    """Whether the row's parameter is the matrix of a linear, a router, an embedding or an output layer."""
    leaf = row.spec.param.rpartition(".")[2]
    return leaf in ("weight", "weight{E}") and row.spec.op != "norm" and not (row.spec.drop or row.same_as)


def form_of(row: Row, dims: Dims, rows: Mapping[int, int]) -> Form:
    """The form of the row's weight, `rows` being B's rows by number of the Hugging Face tensor; some may lack.

    Raises CoverageError where B has other rows than the weight, UnsupportedError where they cannot be told.
    """
    if len(rows) == len(row.hf):
        total = sum(rows.values())
    elif row.spec.op == "glu":
        total = len(row.hf) * next(iter(rows.values()))
    elif row.spec.op in SIZED:
        total = 0
    else:
        raise UnsupportedError(f"`{row.mcore}` (op {row.spec.op}) is adapted in part: {', '.join(row.hf)}")
    form = row_form(row, dims, total)
    for number, got in rows.items():
        if (wanted := form.hf_packs()[number].rows) != got:
            raise CoverageError(
                f"`{row.hf[number]}`: lora_B has {got} rows; {wanted} were expected",
                hint="is this the adapter's base?",
            )
    return form


def columns(slot: Slot, width: int, column: int) -> list[Slot]:
    """One column of a matrix of `width` columns, at the rows of `slot`, as rows of the matrix with one column each."""
    if slot.groups == 1:
        return [Slot(slot.start * width + column, 1, width, slot.size)]
    if slot.size == 1:
        return [Slot(slot.start * width + column, 1, slot.stride * width, slot.groups)]
    return [
        Slot((slot.start + group * slot.stride) * width + column, 1, width, slot.size) for group in range(slot.groups)
    ]
