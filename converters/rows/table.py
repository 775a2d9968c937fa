"""Mapping tables: the rows of an architecture, which name both sides of every tensor, expanded at a config.

`converters.rows.parse` reads them from TOML.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from converters.errors import TableError
from converters.rows.config_map import ConfigTable
from converters.rows.digest import digest_of
from converters.rows.expr import Env, Value, evaluate, evaluate_int


@dataclass(frozen=True, slots=True)
class RowSpec:
    """One row as the table writes it; names are relative to the site and may hold `{L}`, `{I}`, `{E}`.

    `shift` is added to values on the way to Megatron Core. `dtype` is what Megatron Core stores whatever
    the source has; `keep_dtype` exempts the row from a requested cast. `same_as` names the Hugging Face
    tensor this one repeats; `drop` marks a tensor Transformers recomputes.
    """

    param: str
    op: str
    hf: tuple[str, ...]
    transpose: bool = False
    shift: int = 0
    dtype: str | None = None
    keep_dtype: bool = False
    when: str | None = None
    optional: bool = False
    same_as: str | None = None
    drop: bool = False

    @property
    def stacked(self) -> bool:
        """Whether one Hugging Face tensor holds all experts, the expert being its first dimension."""
        return "{E}" in self.param and not any("{E}" in name for name in self.hf)


@dataclass(frozen=True, slots=True)
class Site:
    """A place where blocks of rows repeat: `n` times from layer `first` on.

    An `optional` one exists where the checkpoint holds any tensor below its prefix, and then whole.
    """

    name: str
    hf: str
    mcore: str
    first: str | int
    n: str | int
    blocks: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row at one layer and expert: names are final on the Hugging Face side.

    `site` and `spec.param` spell the Megatron Core parameter; `index` is its number within the site's
    stack and `expert` its expert, both None where the parameter has none.
    """

    spec: RowSpec
    site: str
    index: int | None
    layer: int | None
    expert: int | None
    hf: tuple[str, ...]
    same_as: str | None = None

    @property
    def mcore(self) -> str:
        """Canonical Megatron Core name: global layer numbers, TE module names, expert behind the name."""
        name = self.site + self.spec.param
        if self.index is not None:
            name = name.replace("{I}", str(self.index)).replace("{L}", str(self.layer))
        return name if self.expert is None else name.replace("{E}", str(self.expert))


@dataclass(frozen=True, slots=True)
class Table:
    """A parsed mapping table.

    Inside a larger model, one with a vision tower say, names begin otherwise: `wrapped` are the ways, each from a
    beginning in the rows to that in the checkpoint. Tensors that begin as one of `beside` are that model's own: they
    travel beside the Megatron Core ones as they are.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    family: str
    notes: str
    unsupported: str
    experts: str | int
    config: ConfigTable
    dims: Mapping[str, str | int]
    sites: tuple[Site, ...]
    when: Mapping[str, str]
    blocks: Mapping[str, tuple[tuple[RowSpec, ...], ...]]
    wrapped: tuple[Mapping[str, str], ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of what the table says of a model: not its name, its notes, its comments or its layout."""
        return digest_of(self, leave_out=("name", "table", "notes"))

    def dims_at(self, env: Env) -> dict[str, int]:
        """Values of `[dims]` for one config; dims whose config value is null are left out."""
        values = {}
        for name, expression in self.dims.items():
            if (value := evaluate(expression, env)) is not None:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TableError(f"{self.name}: dim `{name}` = `{expression}` is {value!r}, not a whole number")
                values[name] = value
        return values

    def num_experts(self, env: Env) -> int:
        """Routed experts of a MoE layer, 0 in a dense model."""
        return evaluate_int(self.experts, env) if evaluate(self.experts, env) else 0

    def num_layers(self, env: Env) -> int:
        """Decoder layers of the model."""
        return evaluate_int("num_layers", env)

    def expand(self, env: Env, present: Collection[str] | None, keys: Collection[str] | None = None) -> Iterator[Row]:
        """Every row of the model that `env` describes.

        `present` are the Hugging Face tensor names of the checkpoint, which decide between alternative
        spellings of a row and whether optional rows and sites exist; without it the first alternative holds.
        `keys` are the Megatron Core names of an export's source: where given, they say whether an optional site
        exists, whatever the folder the export is modelled on has.
        """
        experts = self.num_experts(env)
        beginnings = self.beginnings(present)
        for site in self.sites:
            first, count = evaluate_int(site.first, env), evaluate(site.n, env) or 0
            if not isinstance(count, int):
                raise TableError(f"{self.name}: site `{site.name}` repeats {count!r} times")
            for i in range(count):
                place = _Place(site, i, first + i, beginnings)
                here: dict[str, Value] = {**env, "L": place.layer, "I": i}
                names, prefix = (present, place.spelt("")) if keys is None else (keys, place.filled(site.mcore))
                if site.optional and names is not None and not any(name.startswith(prefix) for name in names):
                    continue
                for block in site.blocks:
                    if block in self.when and not evaluate(self.when[block], here):
                        continue
                    for alternatives in self.blocks[block]:
                        usable = [spec for spec in alternatives if spec.when is None or evaluate(spec.when, here)]
                        if usable and (spec := place.chosen(usable, present)) is not None:
                            yield from place.rows(spec, experts)

    def beginnings(self, present: Collection[str] | None) -> Mapping[str, str]:
        """How names of a checkpoint that holds `present` begin: one of `wrapped`, or empty for the rows' own."""
        for way in self.wrapped:
            if any(name.startswith(next(iter(way.values()))) for name in present or ()):
                return way
        return {}


@dataclass(frozen=True, slots=True)
class _Place:
    """A site the `number`th time it repeats; names of the checkpoint begin as `beginnings` say."""

    site: Site
    number: int
    layer: int
    beginnings: Mapping[str, str]

    def filled(self, template: str) -> str:
        """A name with this place's numbers in it."""
        return template.replace("{L}", str(self.layer)).replace("{I}", str(self.number))

    def respelt(self, name: str) -> str:
        """A Hugging Face name of the rows as the checkpoint has it."""
        name = self.filled(name)
        way = next((own for own in self.beginnings if name.startswith(own)), None)
        return name if way is None else self.beginnings[way] + name[len(way) :]

    def spelt(self, name: str) -> str:
        """A Hugging Face name relative to the site, whole."""
        return self.respelt(self.site.hf + name)

    def chosen(self, usable: list[RowSpec], present: Collection[str] | None) -> RowSpec | None:
        """The one of a row's spellings that the checkpoint has, None where it has no such row."""

        def found(spec: RowSpec) -> bool:
            return all(self.spelt(name).replace("{E}", "0") in (present or ()) for name in spec.hf)

        spec = usable[0]
        if present is None:
            return None if spec.drop or (spec.optional and spec.same_as) else spec
        spec = next(filter(found, usable), spec)
        return None if spec.optional and not found(spec) else spec

    def rows(self, spec: RowSpec, experts: int) -> Iterator[Row]:
        """The row, one an expert where it names them."""
        names = tuple(map(self.spelt, spec.hf))
        same_as = self.respelt(spec.same_as) if spec.same_as else None
        mcore = self.site.mcore
        numbered = "{I}" in mcore or "{L}" in mcore or "{L}" in self.site.hf
        index, layer = (self.number, self.layer) if numbered else (None, None)
        if "{E}" not in spec.param and not any("{E}" in name for name in spec.hf):
            yield Row(spec, mcore, index, layer, None, names, same_as)
            return
        for e in range(experts):
            own = names if spec.stacked else tuple(name.replace("{E}", str(e)) for name in names)
            yield Row(spec, mcore, index, layer, e, own, same_as)
