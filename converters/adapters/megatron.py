"""Megatron's spellings of adapters, read and named; keys are torch_dist's.

`MODULE.adapter.linear_in.weight` is A and `MODULE.adapter.linear_out.weight` is B of a whole linear: Megatron-Bridge's
LoRA, whose fused query, key and value (gate and up) share one A. `MODULE.adapter.adapter_q.linear_in.weight`, …,
have factors of their own: its CanonicalLoRA. `adapter.weight_magnitude` is m. Experts are a leading dimension, as in
their weights. `MODULE.lora_a`, `lora_b0`, `lora_m0`, … are those of `mbx train`: one A for each part, stacked.
Source: `sharded_state_dict` in peft/{adapter_wrapper,utils,canonical_lora,dora_layers}.py of Megatron-Bridge.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.adapters.sites import ADAPTABLE, MEMBERS, Adapted, form_of, is_weight
from converters.engine.lowrank import Site
from converters.engine.plan import row_form
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.torch_dist import Home, homes, stacks_layers
from converters.rows.expr import Env, Value
from converters.rows.ops import Form
from converters.rows.pack import Pack
from converters.rows.table import Row, Table
from converters.tensors import StoredTensor

_A, _B, _M = "linear_in.weight", "linear_out.weight", "weight_magnitude"
#: What shows that a key belongs to an adapter.
MARKS = (".adapter.", ".lora_")


def read_megatron(
    table: Table, config: Mapping[str, Value], env: Env, tensors: Mapping[str, StoredTensor]
) -> tuple[Adapted, ...]:
    """Adapters by the rows of `table`; CoverageError for tensors that adapt nothing, or do not fit."""
    reader = _Reader(table, config, env, tensors)
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

    def __init__(
        self, table: Table, config: Mapping[str, Value], env: Env, tensors: Mapping[str, StoredTensor]
    ) -> None:
        self.tensors, self.dims = tensors, table.dims_at(env)
        self.stacked = stacks_layers(table.family, config)
        self.layers, self.experts = table.num_layers(env), table.num_experts(env)
        self.used: set[str] = set()

    def match(self, row: Row) -> Adapted | None:
        if row.spec.op not in ADAPTABLE:
            return None
        for stacked in (self.stacked, not self.stacked):
            (home,) = homes(row, stacked, self.layers, self.experts)
            found = self._plain(row, home) or self._members(row, home) or self._trained(row, home)
            if found is not None:
                return found
        return None

    def _plain(self, row: Row, home: Home) -> Adapted | None:
        base = _module(home) + "adapter."
        if base + _A not in self.tensors:
            return None
        b = self._tensor(base + _B, home)
        form = row_form(row, self.dims, b.shape[len(home.stack)])
        return Adapted(row, form, (self._site(base, home, form.order(), form.mcore_pack()),))

    def _members(self, row: Row, home: Home) -> Adapted | None:
        bases = {n: f"{_module(home)}adapter.{name}." for n, name in enumerate(MEMBERS.get(row.spec.op, ()))}
        held = {n: base for n, base in bases.items() if base + _A in self.tensors}
        if not held:
            return None
        rows = {n: self._tensor(base + _B, home).shape[len(home.stack)] for n, base in held.items()}
        form = form_of(row, self.dims, rows)
        sites = [self._site(base, home, form.hf[n][1], form.hf_packs()[n]) for n, base in held.items()]
        return Adapted(row, form, tuple(sites))

    def _trained(self, row: Row, home: Home) -> Adapted | None:
        base = _module(home)
        if f"{base}lora_a" not in self.tensors:
            return None
        count = sum(f"{base}lora_b{n}" in self.tensors for n in range(len(row.hf)))
        rows = {n: self._tensor(f"{base}lora_b{n}", home).shape[len(home.stack)] for n in range(count)}
        # one adapter for all atoms: its rows lie as the linear's do
        form = row_form(row, self.dims, rows[0]) if count == 1 else form_of(row, self.dims, rows)
        sites = []
        for n in range(count):
            names = f"{base}lora_a", f"{base}lora_b{n}", f"{base}lora_m{n}"
            atoms, pack = (form.order(), form.mcore_pack()) if count == 1 else (form.hf[n][1], form.hf_packs()[n])
            sites.append(self._named(names, home, atoms, pack, n, count))
        return Adapted(row, form, tuple(sites))

    def _site(self, base: str, home: Home, atoms: tuple[int, ...], pack: Pack) -> Site:
        return self._named((base + _A, base + _B, base + _M), home, atoms, pack, 0, 1)

    def _named(
        self, names: tuple[str, str, str], home: Home, atoms: tuple[int, ...], pack: Pack, part: int, parts: int
    ) -> Site:
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
        for n, ((_, atoms), pack) in enumerate(zip(form.hf, form.hf_packs(), strict=True))
        if adapted.site_of(atoms[0]) is not None
    )


def _named_site(base: str, adapted: Adapted, form: Form, home: Home, atoms: tuple[int, ...], pack: Pack) -> Site:
    source = adapted.site_of(atoms[0])
    assert source is not None
    m = None if source.m is None else base + _M
    return Site(base + _A, base + _B, m, atoms, pack, source.rank, source.inputs, home.index, home.stack)
