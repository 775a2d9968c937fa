"""Megatron's spellings of adapters, read and named; keys are torch_dist's.

`MODULE.adapter.linear_in.weight` is A and `MODULE.adapter.linear_out.weight` is B of a whole linear: Megatron-Bridge's
LoRA, whose fused query, key and value (gate and up) share one A. `MODULE.adapter.adapter_q.linear_in.weight`, …,
have factors of their own: its CanonicalLoRA. `adapter.weight_magnitude` is m. Experts are a leading dimension, as in
their weights. `MODULE.lora_a`, `lora_b0`, `lora_m0`, … are those of `mbx train`: the A's of the parts that PEFT adapts
apart, stacked, and a B and m for each atom; `lora_b`, `lora_m` are of all atoms together.
Source: `sharded_state_dict` in peft/{adapter_wrapper,utils,canonical_lora,dora_layers}.py of Megatron-Bridge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from converters.adapters.peft_keys import untied
from converters.adapters.sites import ADAPTABLE, MEMBERS, SIZED, Adapted, form_of, is_adaptable, is_weight
from converters.engine.lowrank import Site
from converters.engine.plan import row_form
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.keys import HEAD
from converters.mcore.torch_dist import Home, homes
from converters.planning.join import Joiner
from converters.rows.expr import Env, Value
from converters.rows.ops import Form
from converters.rows.pack import Pack
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

#: Keys of A, B and m.
_Names = tuple[str, str, str]
#: As many as any op has.
_MOST_ATOMS = 8
#: What shows that a key belongs to an adapter.
MARKS = (".adapter.", ".lora_")
#: How the keys of a tower begin that a run trains, or adapts, beside the text model.
TOWER = "tower."


def read_megatron(
    table: Table, config: Mapping[str, Value], env: Env, tensors: Mapping[str, StoredTensor]
) -> tuple[Adapted, ...]:
    """Adapters by the rows of `table`; CoverageError for tensors that adapt nothing, or do not fit."""
    reader = _Reader(Joiner.at(table, config), tensors)
    found = [got for row in table.expand(untied(env), None) if is_weight(row) and (got := reader.match(row))]
    if left := sorted(set(tensors) - reader.used):
        raise CoverageError(
            f"adapter: {len(left)} of {len(tensors)} tensors adapt nothing that table `{table.name}` knows, "
            f"first `{left[0]}`",
            details=[f"`{name}`" for name in left],
        )
    return tuple(found)


class _Reader:
    """Matches rows with keys; `used` are the keys that a row took."""

    def __init__(self, joiner: Joiner, tensors: Mapping[str, StoredTensor]) -> None:
        self.joiner, self.tensors = joiner, tensors
        self.used: set[str] = set()

    def match(self, row: Row) -> Adapted | None:
        if not is_adaptable(row):
            return None
        for stacked in (self.joiner.stacked, not self.joiner.stacked):
            home = homes(row, stacked, self.joiner.layers, self.joiner.experts)[0]
            if f"{_module(home)}lora_a" in self.tensors:
                return self._trained(row, home)
            for names, whole in self._spellings(row, _module(home)):
                if names:
                    return self._adapted(row, home, names, whole=whole)
        return None

    def _spellings(self, row: Row, module: str) -> Iterator[tuple[dict[int, _Names], bool]]:
        """Keys by number of the Hugging Face tensor, and whether they are the whole linear's."""
        base = f"{module}adapter."
        yield self._held({0: _factors(base)}), True
        members = enumerate(MEMBERS.get(row.spec.op, ()))
        yield self._held({n: _factors(f"{base}{name}.") for n, name in members}), False

    def _held(self, names: Mapping[int, _Names]) -> dict[int, _Names]:
        return {n: own for n, own in names.items() if own[0] in self.tensors}

    def _adapted(self, row: Row, home: Home, names: Mapping[int, _Names], *, whole: bool) -> Adapted:
        rows = {n: self._tensor(own[1], home).shape[len(home.stack)] for n, own in names.items()}
        dims = self.joiner.at_row(row)[1]
        form = row_form(row, dims, rows[0]) if whole else form_of(row, dims, rows)
        lying = {0: (form.order(), form.mcore_pack())} if whole else dict(enumerate(_members(form)))
        sites = [self._named(own, home, *lying[n]) for n, own in names.items()]
        return Adapted(row, form, tuple(sites))

    def _trained(self, row: Row, home: Home) -> Adapted:
        """Factors as `mbx train` names them: B's by atom, or one for all."""
        module, dims, depth = _module(home), self.joiner.at_row(row)[1], len(home.stack)

        def b_shape(atom: int | str) -> Shape:
            return self._tensor(f"{module}lora_b{atom}", home).shape[depth:]

        if f"{module}lora_b" in self.tensors:
            form = row_form(row, dims, b_shape("")[0])
            whole = self._part(module, home, "", form.order(), form.mcore_pack(), (0, 0))
            return Adapted(row, form, (whole,))
        atoms = [n for n in range(_MOST_ATOMS) if f"{module}lora_b{n}" in self.tensors]
        if not atoms:
            raise CoverageError(f"adapter: `{module}lora_a` has no B beside it")
        sized = row.spec.op in SIZED  # else an atom is a Hugging Face tensor
        form = row_form(row, dims, 0) if sized else form_of(row, dims, {n: b_shape(n)[0] for n in atoms})
        members = [[atom for atom in held if atom in atoms] for _, held in form.hf]
        ranks = [b_shape(held[0])[1] if held else 0 for held in members]
        sites = [
            self._part(module, home, atom, (atom,), Pack(1, (form.atoms[atom],)), (sum(ranks[:n]), sum(ranks)))
            for n, held in enumerate(members)
            for atom in held
        ]
        return Adapted(row, form, tuple(sites))

    def _part(
        self, module: str, home: Home, atom: int | str, atoms: tuple[int, ...], pack: Pack, a_rows: tuple[int, int]
    ) -> Site:
        names = f"{module}lora_a", f"{module}lora_b{atom}", f"{module}lora_m{atom}"
        return self._named(names, home, atoms, pack, *a_rows)

    def _named(
        self, names: _Names, home: Home, atoms: tuple[int, ...], pack: Pack, first: int = 0, a_rows: int = 0
    ) -> Site:
        a, b = (self._tensor(name, home) for name in names[:2])
        m = self._tensor(names[2], home).name if names[2] in self.tensors else None
        inputs, rank = a.shape[-1], b.shape[-1]
        site = Site(a.name, b.name, m, atoms, pack, rank, inputs, home.index, home.stack, first=first, a_rows=a_rows)
        # B has a row for each row that pads the vocabulary
        padded = home.key.endswith(HEAD) and b.shape[1:] == site.b_shape[1:] and b.shape[0] > site.b_shape[0]
        if a.shape != site.a_shape or not (padded or b.shape == site.b_shape):
            raise CoverageError(
                f"`{a.name}` {list(a.shape)} and `{b.name}` {list(b.shape)} do not fit: "
                f"{list(site.a_shape)} and {list(site.b_shape)} were expected"
            )
        return site

    def _tensor(self, name: str, home: Home) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CoverageError(f"adapter: `{name}` is missing")
        self.used.add(name)
        if tensor.shape[: len(home.stack)] != home.stack or len(tensor.shape) - len(home.stack) not in (1, 2):
            raise CoverageError(
                f"`{name}` has shape {list(tensor.shape)}; the config asks for a stack of {list(home.stack)}"
            )
        return tensor


def _module(home: Home) -> str:
    return home.key.rpartition("weight")[0]  # of a fused weight that is stored by parts, these come behind


def _factors(base: str) -> _Names:
    return f"{base}linear_in.weight", f"{base}linear_out.weight", f"{base}weight_magnitude"


def _members(form: Form) -> Iterator[tuple[tuple[int, ...], Pack]]:
    """Atoms of each Hugging Face tensor, and how they lie there."""
    for (_, atoms), pack in zip(form.hf, form.hf_packs(), strict=True):
        yield atoms, pack


def megatron_sites(adapted: Adapted, home: Home, *, fused: bool) -> tuple[Site, ...]:
    """Sites of the same adapters under Megatron-Bridge's names, at the place `home` of their weight.

    Several Hugging Face projections inside one linear stay apart (CanonicalLoRA) unless `fused`. Raises
    UnsupportedError for linears that have no adapter there, and for a fused one that is adapted in part.
    """
    row, form = adapted.row, adapted.form
    if row.spec.op not in ADAPTABLE:
        raise UnsupportedError(
            f"`{', '.join(row.hf)}` is adapted; Megatron Core's `{home.key}` (op {row.spec.op}) takes no adapter",
            hint="`mbx convert merge` merges it into the weights",
        )
    base, members = _module(home) + "adapter.", MEMBERS.get(row.spec.op)
    if members is None or fused:
        if missing := [row.hf[n] for n, (_, atoms) in enumerate(form.hf) if adapted.site_of(atoms[0]) is None]:
            raise UnsupportedError(f"`{home.key}`: one A for all parts needs an adapter on `{missing[0]}` too")
        return (_named_site(base, adapted, form, home, form.order(), form.mcore_pack()),)
    return tuple(
        _named_site(f"{base}{members[n]}.", adapted, form, home, atoms, pack)
        for n, (atoms, pack) in enumerate(_members(form))
        if adapted.site_of(atoms[0]) is not None
    )


def _named_site(base: str, adapted: Adapted, form: Form, home: Home, atoms: tuple[int, ...], pack: Pack) -> Site:
    source = adapted.site_of(atoms[0])
    assert source is not None
    a, b, m = _factors(base)
    return Site(a, b, None if source.m is None else m, atoms, pack, source.rank, source.inputs, home.index, home.stack)
