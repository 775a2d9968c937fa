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
            numbered = "{I}" in site.mcore or "{L}" in site.mcore or "{L}" in site.hf
            for i in range(count):
                here: dict[str, Value] = {**env, "L": first + i, "I": i}
                number = {"{L}": str(first + i), "{I}": str(i)}
                hf_prefix = _fill(site.hf, number)
                spelt = _respelt(hf_prefix, beginnings)
                names, prefix = (present, spelt) if keys is None else (keys, _fill(site.mcore, number))
                if site.optional and names is not None and not any(name.startswith(prefix) for name in names):
                    continue
                for block in site.blocks:
                    if block in self.when and not evaluate(self.when[block], here):
                        continue
                    for alternatives in self.blocks[block]:
                        yield from self._rows(
                            alternatives,
                            site,
                            i if numbered else None,
                            first + i,
                            hf_prefix,
                            number,
                            here,
                            experts,
                            present,
                            beginnings,
                        )

    def beginnings(self, present: Collection[str] | None) -> Mapping[str, str]:
        """How names of a checkpoint that holds `present` begin: one of `wrapped`, or empty for the rows' own."""
        for way in self.wrapped:
            if any(name.startswith(next(iter(way.values()))) for name in present or ()):
                return way
        return {}

    def _rows(
        self,
        alternatives: tuple[RowSpec, ...],
        site: Site,
        index: int | None,
        layer: int,
        hf_prefix: str,
        number: Mapping[str, str],
        env: Env,
        experts: int,
        present: Collection[str] | None,
        beginnings: Mapping[str, str],
    ) -> Iterator[Row]:
        def spelt(spec: RowSpec) -> tuple[str, ...]:
            return tuple(_respelt(hf_prefix + _fill(name, number), beginnings) for name in spec.hf)

        def found(spec: RowSpec) -> bool:
            return present is not None and all(name.replace("{E}", "0") in present for name in spelt(spec))

        usable = [spec for spec in alternatives if spec.when is None or evaluate(spec.when, env)]
        if not usable:
            return
        spec = usable[0]
        if present is not None:
            spec = next(filter(found, usable), spec)
            if spec.optional and not found(spec):
                return
        elif spec.drop or (spec.optional and spec.same_as):
            return
        names = spelt(spec)
        same_as = _respelt(_fill(spec.same_as, number), beginnings) if spec.same_as else None
        if "{E}" not in spec.param and not any("{E}" in name for name in spec.hf):
            yield Row(spec, site.mcore, index, layer if index is not None else None, None, names, same_as)
            return
        for e in range(experts):
            text = str(e)
            own = names if spec.stacked else tuple(name.replace("{E}", text) for name in names)
            yield Row(spec, site.mcore, index, layer if index is not None else None, e, own, same_as)


def _respelt(name: str, beginnings: Mapping[str, str]) -> str:
    way = next(((own, other) for own, other in beginnings.items() if name.startswith(own)), None)
    return name if way is None else way[1] + name[len(way[0]) :]


def _fill(template: str, number: Mapping[str, str]) -> str:
    for placeholder, text in number.items():
        template = template.replace(placeholder, text)
    return template
