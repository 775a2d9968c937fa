"""Megatron's spellings of adapters, read and named; keys are torch_dist's.

`MODULE.adapter.linear_in.weight` is A and `MODULE.adapter.linear_out.weight` is B of a whole linear: Megatron-Bridge's
LoRA, whose fused query, key and value (gate and up) share one A. `MODULE.adapter.adapter_q.linear_in.weight`, …,
have factors of their own: its CanonicalLoRA. `adapter.weight_magnitude` is m. Experts are a leading dimension, as in
their weights. `MODULE.lora_a`, `lora_b0`, `lora_m0`, … are those of `mbx train`: one A for each part, stacked.
Source: `sharded_state_dict` in peft/{adapter_wrapper,utils,canonical_lora,dora_layers}.py of Megatron-Bridge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from converters.adapters.sites import ADAPTABLE, MEMBERS, Adapted, form_of, is_weight
from converters.engine.lowrank import Site
from converters.engine.plan import row_form
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.torch_dist import Home, homes
from converters.planning.join import Joiner
from converters.rows.expr import Env, Value
from converters.rows.ops import Form
from converters.rows.pack import Pack
from converters.rows.table import Row, Table
from converters.tensors import StoredTensor

#: Keys of A, B and m.
_Names = tuple[str, str, str]
#: What shows that a key belongs to an adapter.
MARKS = (".adapter.", ".lora_")


def read_megatron(
    table: Table, config: Mapping[str, Value], env: Env, tensors: Mapping[str, StoredTensor]
) -> tuple[Adapted, ...]:
    """Adapters by the rows of `table`; CoverageError for tensors that adapt nothing, or do not fit."""
    reader = _Reader(Joiner.at(table, config), tensors)
    found = [got for row in table.expand(env, None) if is_weight(row) and (got := reader.match(row))]
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
        if row.spec.op not in ADAPTABLE:
            return None
        for stacked in (self.joiner.stacked, not self.joiner.stacked):
            (home,) = homes(row, stacked, self.joiner.layers, self.joiner.experts)
            for names, whole, shared in self._spellings(row, _module(home)):
                if names:
                    return self._adapted(row, home, names, whole=whole, parts=len(names) if shared else 1)
        return None

    def _spellings(self, row: Row, module: str) -> Iterator[tuple[dict[int, _Names], bool, bool]]:
        """Keys by number of the Hugging Face tensor, whether they are the whole linear's, and share one A."""
        base = f"{module}adapter."
        yield self._held({0: _factors(base)}), True, False
        members = enumerate(MEMBERS.get(row.spec.op, ()))
        yield self._held({n: _factors(f"{base}{name}.") for n, name in members}), False, False
        count = sum(f"{module}lora_b{n}" in self.tensors for n in range(len(row.hf)))
        names = {n: (f"{module}lora_a", f"{module}lora_b{n}", f"{module}lora_m{n}") for n in range(count)}
        # one adapter for all atoms: its rows lie as the linear's do
        yield self._held(names), count == 1, True

    def _held(self, names: Mapping[int, _Names]) -> dict[int, _Names]:
        return {n: own for n, own in names.items() if own[0] in self.tensors}

    def _adapted(self, row: Row, home: Home, names: Mapping[int, _Names], *, whole: bool, parts: int) -> Adapted:
        rows = {n: self._tensor(own[1], home).shape[len(home.stack)] for n, own in names.items()}
        dims = self.joiner.dims
        form = row_form(row, dims, rows[0]) if whole else form_of(row, dims, rows)
        lying = {0: (form.order(), form.mcore_pack())} if whole else dict(enumerate(_members(form)))
        sites = [self._named(own, home, *lying[n], n if parts > 1 else 0, parts) for n, own in names.items()]
        return Adapted(row, form, tuple(sites))

    def _named(self, names: _Names, home: Home, atoms: tuple[int, ...], pack: Pack, part: int, parts: int) -> Site:
        a, b = (self._tensor(name, home) for name in names[:2])
        m = self._tensor(names[2], home).name if names[2] in self.tensors else None
        rows, inputs = a.shape[len(home.stack) :]
        site = Site(
            a.name, b.name, m, atoms, pack, rows // parts, inputs, home.index, home.stack, part=part, parts=parts
        )
        if (a.shape, b.shape) != (site.a_shape, site.b_shape):
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
    return home.key.removesuffix("weight")


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
