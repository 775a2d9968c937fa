"""Mapping tables: the rows of an architecture, which name both sides of every tensor, expanded at a config.

`converters.rows.parse` reads them from TOML.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from converters.errors import TableError, UsageError
from converters.rows.config_map import ConfigTable
from converters.rows.digest import digest_of
from converters.rows.expr import Env, Value, evaluate, evaluate_int
from converters.rows.row import Row, RowSpec, Site

__all__ = ["Arrangement", "Kind", "Row", "RowSpec", "Site", "Table", "respelt"]


#: Releases of a tool whose arrangement is the usual one's where a table has none for them.
_RELEASES_OF = {"bridge-0.3": "bridge", "bridge-main": "bridge"}


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How one flavour of Megatron checkpoints arranges a model with towers.

    `prefix` stands before the text model's names; `sites` are those of the table's towers that it has, and `kept` the
    modules that it holds as they are, by the prefix of their tensors.
    """

    prefix: str
    sites: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers of a kind: those where `when` holds. `fields` are expressions over the model's fields."""

    when: str
    fields: Mapping[str, str | int]

    def over(self, env: Env) -> Env:
        """Names that expressions of such a layer's rows see."""
        return {**env, **{name: evaluate(expression, env) for name, expression in self.fields.items()}}


@dataclass(frozen=True, slots=True)
class Table:
    """A parsed mapping table.

    Inside a larger model, one with a vision tower say, names of a folder begin otherwise than rows say: `wrapped` are
    the ways, each from a beginning in the rows to that in the folder. `towers` are the sites of what stands beside the
    text model, whose own types are `text_types`, and `kept` the prefixes of modules that may be held as they are; each
    of `flavours` takes some of both. Dims of a tower are `part_dims`, over the fields of its part.
    Layers are of those of `kinds` whose conditions hold: their rows see their fields in place of the model's.
    As long as no `flavour` is chosen the table is of the text model alone, and tensors that begin as one of `beside`
    travel beside the Megatron Core ones as they are. A table without `flavours` has one where a tool stores its rows
    otherwise.
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
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    wrapped: tuple[Mapping[str, str], ...] = ()
    text_types: tuple[str, ...] = ()
    towers: tuple[Site, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    part_dims: Mapping[str, str | int] = field(default_factory=dict)
    flavours: Mapping[str, Arrangement] = field(default_factory=dict)
    flavour: str = ""

    @property
    def beside(self) -> tuple[str, ...]:
        """Beginnings of the folder's tensors that are no part of what this table converts."""
        own = [*self.kept.values(), *(site.hf.partition("{")[0] for site in self.towers)]
        if self.flavour:
            held = tuple(site.hf for site in self.sites if site.kept or site in self.towers)
            own = [name for name in own if not any(at.startswith(name) or name.startswith(at) for at in held)]
        ways: tuple[Mapping[str, str], ...] = self.wrapped or ({},)
        return tuple(dict.fromkeys(respelt(name, way) for way in ways for name in own))

    def travels(self, name: str) -> bool:
        """Whether a tensor of a folder is no part of what this table converts, and travels beside it."""
        return name.startswith(self.beside) or any(pattern.fullmatch(name) for pattern in self._beside_rows())

    def _beside_rows(self) -> Iterator[re.Pattern[str]]:
        """Names of rows that travel so, whatever their numbers."""
        for site in self.sites:
            for spec in (spec for block in site.blocks for row in self.blocks[block] for spec in row if spec.beside):
                for name in spec.hf:
                    yield re.compile(re.sub(r"\\{[LI]\\}", r"\\d+", re.escape(site.hf + name)))

    @property
    def prefix(self) -> str:
        """What stands before the text model's Megatron Core names."""
        return self.arrangement(self.flavour).prefix if self.flavour and self.flavours else ""

    def arrangement(self, flavour: str) -> Arrangement:
        """Where `flavour` puts the towers; UsageError where the table has none of that name."""
        chosen = self.flavours.get(flavour) or self.flavours.get(_RELEASES_OF.get(flavour, flavour))
        if chosen is None:
            known = ", ".join(self.flavours) or "bridge"
            raise UsageError(f"the table `{self.name}` has no flavour `{flavour}`", hint=f"its flavours: {known}")
        return chosen

    def in_flavour(self, name: str) -> Table:
        """The table of the whole model as the flavour `name` arranges it; UsageError where there is none such."""
        chosen = self.arrangement(name)
        text = (site if site.outer else replace(site, mcore=chosen.prefix + site.mcore) for site in self.sites)
        kept = (Site(name, self.kept[name], at, 0, 1, (), kept=True) for name, at in chosen.kept.items())
        towers = tuple(site for site in self.towers if site.name in chosen.sites)
        return replace(self, sites=(*text, *kept, *towers), flavour=name)

    @property
    def digest(self) -> str:
        """SHA-256 of what the table says of a model: not its name, its notes, its comments or its layout."""
        return digest_of(self, leave_out=("name", "table", "notes", "waived", "idle"))

    def parts(self) -> tuple[str, ...]:
        """Names of the parts whose native sites this table has."""
        return tuple(dict.fromkeys(site.part for site in self.sites if site.part))

    def dims_at(self, env: Env, *, of_part: bool = False) -> dict[str, int]:
        """Values of `[dims]` for one config, or for a part's; dims whose config value is null are left out."""
        values = {}
        for name, expression in (self.part_dims if of_part else self.dims).items():
            if (value := evaluate(expression, env)) is not None:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TableError(f"{self.name}: dim `{name}` = `{expression}` is {value!r}, not a whole number")
                values[name] = value
        return values

    def dims_of(self, row: Row, env: Env) -> dict[str, int]:
        """Values of `[dims]` for a row of the text model."""
        return self.dims_at(self.seen_by(row.kind, env))

    def num_experts(self, env: Env) -> int:
        """Routed experts of a MoE layer, 0 in a dense model."""
        return evaluate_int(self.experts, env) if evaluate(self.experts, env) else 0

    def num_layers(self, env: Env) -> int:
        """Decoder layers of the model; 0 where no field counts such."""
        return evaluate_int("num_layers", env) if "num_layers" in env else 0

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
            if site.kept:
                yield from _Place(site, 0, 0, beginnings).kept(present or (), keys or ())
                continue
            first, count = evaluate_int(site.first, env), evaluate(site.n, env) or 0
            if isinstance(count, list | tuple):
                count = len(count)
            if not isinstance(count, int):
                raise TableError(f"{self.name}: site `{site.name}` repeats {count!r} times")
            layers = [n for n in range(first, first + count) if not site.when or evaluate(site.when, {**env, "L": n})]
            for i, layer in enumerate(layers):
                place, here = self.place(site, i, layer, beginnings, len(layers), env)
                names, prefix = (present, place.spelt("")) if keys is None else (keys, place.filled(site.mcore))
                if site.optional and names is not None and not any(name.startswith(prefix) for name in names):
                    continue
                for block in site.blocks:
                    if block in self.when and not evaluate(self.when[block], here):
                        continue
                    for alternatives in self.blocks[block]:
                        usable = [spec for spec in alternatives if spec.when is None or evaluate(spec.when, here)]
                        if usable and (spec := place.chosen(usable, present, here)) is not None:
                            yield from place.rows(spec, experts)

    def tied(self, env: Env, present: Collection[str]) -> Iterator[str]:
        """Tensors outside of layers that repeat another in the model `env` describes, whether or not a folder that
        holds `present` stores them."""
        beginnings = self.beginnings(present)
        for site in [site for site in self.sites if "{" not in site.hf + site.mcore]:
            blocks = [name for name in site.blocks if name not in self.when or evaluate(self.when[name], env)]
            for spec in [spec for name in blocks for alternatives in self.blocks[name] for spec in alternatives]:
                if spec.same_as and (spec.when is None or evaluate(spec.when, env)):
                    yield from (respelt(site.hf + name, beginnings) for name in spec.hf)

    def place(
        self, site: Site, number: int, layer: int, beginnings: Mapping[str, str], count: int, env: Env
    ) -> tuple[_Place, Env]:
        """A site the `number`th time of `count`, and the names that expressions see there."""
        here: dict[str, Value] = {**env, "L": layer, "I": number}
        own = [name for name, kind in self.kinds.items() if "." in site.mcore and evaluate(kind.when, here)]
        here |= self.seen_by("+".join(own), env)
        return _Place(site, number, layer, beginnings, count, "+".join(own)), {**here, "L": layer, "I": number}

    def seen_by(self, kind: str, env: Env) -> Env:
        """Names that rows see at layers of the kinds that a row's `kind` joins."""
        for name in filter(None, kind.split("+")):
            env = self.kinds[name].over(env)
        return env

    def beginnings(self, present: Collection[str] | None) -> Mapping[str, str]:
        """How names of a folder that holds `present` begin: the one of `wrapped` most of whose beginnings are there.

        Without `present` it is the first; without any the rows' own.
        """

        def shown(way: Mapping[str, str]) -> int:
            return sum(any(name.startswith(start) for name in names) for start in way.values())

        names = {".".join(name.split(".")[:4]) for name in present or ()}
        best = max(self.wrapped, key=shown, default={})
        return best if present is None or shown(best) else {}


@dataclass(frozen=True, slots=True)
class _Place:
    """A site the `number`th time of `count` that it repeats, at a layer of a `kind`.

    Names of the checkpoint begin as `beginnings` say.
    """

    site: Site
    number: int
    layer: int
    beginnings: Mapping[str, str]
    count: int = 1
    kind: str = ""

    def filled(self, template: str) -> str:
        """A name with this place's numbers in it."""
        return template.replace("{L}", str(self.layer)).replace("{I}", str(self.number))

    def respelt(self, name: str) -> str:
        """A Hugging Face name of the rows as the checkpoint has it."""
        return respelt(self.filled(name), self.beginnings)

    def spelt(self, name: str) -> str:
        """A Hugging Face name relative to the site, whole."""
        return self.respelt(self.site.hf + name)

    def chosen(self, usable: list[RowSpec], present: Collection[str] | None, env: Env) -> RowSpec | None:
        """The one of a row's spellings that the checkpoint has, None where it has no such row."""

        def found(spec: RowSpec) -> bool:
            names = [self.spelt(name).replace("{E}", "0") for name in spec.hf]
            if not all(name in (present or ()) for name in names):
                return False
            if not isinstance(present, Mapping):
                return True
            said = {self.spelt(name): evaluate(size, env) for name, size in spec.last.items()}
            return all(name not in present or present[name].shape[-1] == size for name, size in said.items())

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
        part = self.site.part
        count = self.count if numbered and (part or self.site.when) else None
        if "{E}" not in spec.param and not any("{E}" in name for name in spec.hf):
            yield Row(spec, mcore, index, layer, None, names, same_as, count=count, part=part, kind=self.kind)
            return
        for e in range(experts):
            own = names if spec.stacked else tuple(name.replace("{E}", str(e)) for name in names)
            yield Row(spec, mcore, index, layer, e, own, same_as, kind=self.kind)

    def kept(self, present: Iterable[str], keys: Iterable[str]) -> Iterator[Row]:
        """A row for each tensor of a kept module, whichever side has it: the same name behind either prefix."""
        sides = ((self.spelt(""), present), (self.site.mcore, keys))
        inner = dict.fromkeys(name[len(start) :] for start, names in sides for name in names if name.startswith(start))
        for name in inner:
            spec = RowSpec(name, "copy", (name,))
            yield Row(spec, self.site.mcore, None, None, None, (self.spelt(name),), kept=True)


def respelt(name: str, beginnings: Mapping[str, str]) -> str:
    """`name` with its beginning replaced by what `beginnings` says, if it has one of them."""
    own = next((own for own in beginnings if name.startswith(own)), None)
    return name if own is None else beginnings[own] + name[len(own) :]
