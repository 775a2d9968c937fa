"""Where a format keeps the two factors of a low-rank update, and which atoms of the weight they update.

The update of a weight `W: [out, in]` is `scale · B A` with `A: [r, in]` and `B: [out, r]` (arXiv 2106.09685), so B
shares W's rows and A its columns: what a table's row says of W's rows holds for B's. DoRA adds one magnitude a row,
`m: [out]` (arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from converters.errors import CoverageError, UnsupportedError
from converters.ops import Dims, Form
from converters.pack import Pack, Slot
from converters.plan import row_form
from converters.table import Row, Table
from converters.tensors import Shape

#: Names of the parts of a fused weight that Megatron-Bridge's CanonicalLoRA adapts apart (peft/canonical_lora.py).
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("adapter_q", "adapter_k", "adapter_v"),
    "qkv_own": ("adapter_q", "adapter_k", "adapter_v"),
    "qgkv": ("adapter_q", "adapter_k", "adapter_v"),
    "glu": ("adapter_gate", "adapter_up"),
}
#: Ops whose weight is one Megatron Core linear with an adapter of its own; one of a vocabulary, say, has none.
ADAPTABLE = frozenset((*MEMBERS, "copy", "col", "row", "glu_fused", "glu_zip", "qkv_fused"))


@dataclass(frozen=True, slots=True)
class Site:
    """One A, one B and, for DoRA, one m: names of their tensors, and the part of each that belongs here.

    `atoms` are the atoms of the weight that B's rows hold, in the order of `pack`. `index` picks an entry of leading
    dimensions `stack`. With `experts`, A's rows and B's columns hold all experts, this one being number `expert`:
    A `[experts · r, in]`, B `[out, r · experts]` with the expert fastest (`ParamWrapper` of PEFT). With `parts`,
    A's rows hold that many factors, this one being number `part`.
    """

    a: str
    b: str
    m: str | None
    atoms: tuple[int, ...]
    pack: Pack
    rank: int
    inputs: int
    index: Shape = ()
    stack: Shape = ()
    expert: int = 0
    experts: int = 0
    part: int = 0
    parts: int = 1

    @property
    def a_shape(self) -> Shape:
        """Shape of the whole tensor A."""
        return (*self.stack, self.rank * (self.experts or self.parts), self.inputs)

    @property
    def b_shape(self) -> Shape:
        """Shape of the whole tensor B."""
        return (*self.stack, self.pack.rows, self.rank * max(1, self.experts))

    @property
    def m_shape(self) -> Shape:
        """Shape of the whole tensor m."""
        return (*self.stack, self.pack.rows)

    @property
    def a_slot(self) -> Slot:
        """Rows of A that are this site's."""
        return Slot((self.expert if self.experts else self.part) * self.rank, self.rank, self.rank, 1)

    @property
    def a_key(self) -> tuple[str, Shape, int]:
        """What two sites share that have one factor A."""
        return self.a, self.index, self.a_slot.start

    @property
    def owns_a(self) -> bool:
        """Whether the tensor A holds this factor alone."""
        return not self.stack and not self.experts and self.parts == 1

    def rows(self) -> dict[int, Slot]:
        """Rows of B and m by atom."""
        return dict(zip(self.atoms, self.pack.slots(), strict=True))


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
    elif row.spec.op in ("qkv", "qgkv"):
        total = 0  # the config says all
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
