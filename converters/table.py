"""Mapping tables: one TOML file an architecture, read into rows that name both sides of every tensor.

Grammar (see docs/add-a-model.md): `[sites]` say where blocks repeat, `[when]` at which layers, `[rows.BLOCK]`
pair one Megatron Core parameter with its Hugging Face tensors under an op. `{L}` is the global layer,
`{I}` the index within the site, `{E}` the expert.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from converters.config_map import ConfigTable, parse_config
from converters.errors import TableError
from converters.expr import Env, Value, evaluate, evaluate_int
from converters.ops import OPS

GAMMA = {"zero": 0, "one": 1}
FAMILIES = ("gpt", "hybrid")
_TOP_KEYS = frozenset(
    "model_types architectures mcore notes unsupported experts gamma config dims sites when rows codecs".split()
)
_ROW_KEYS = frozenset("transpose hf_gamma dtype keep_dtype when optional same_as drop hf".split())
_SITE_KEYS = frozenset("hf mcore first n rows optional".split())


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
    """A parsed mapping table; `digest` is the SHA-256 of its text."""

    name: str
    digest: str
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
    codecs: Mapping[str, str] = field(default_factory=dict)

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
        spellings of a row and whether optional rows and sites exist; without it the first alternative holds, and
        the Megatron Core names `keys`, where given, say whether an optional site exists.
        """
        experts = self.num_experts(env)
        for site in self.sites:
            first, count = evaluate_int(site.first, env), evaluate(site.n, env) or 0
            if not isinstance(count, int):
                raise TableError(f"{self.name}: site `{site.name}` repeats {count!r} times")
            numbered = "{I}" in site.mcore or "{L}" in site.mcore or "{L}" in site.hf
            for i in range(count):
                here: dict[str, Value] = {**env, "L": first + i, "I": i}
                number = {"{L}": str(first + i), "{I}": str(i)}
                hf_prefix = _fill(site.hf, number)
                names, prefix = (keys, _fill(site.mcore, number)) if present is None else (present, hf_prefix)
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
                        )

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
    ) -> Iterator[Row]:
        usable = [spec for spec in alternatives if spec.when is None or evaluate(spec.when, env)]
        if not usable:
            return
        spec = usable[0]
        if present is not None:
            spec = next((s for s in usable if self._found(s, hf_prefix, number, present)), spec)
            if spec.optional and not self._found(spec, hf_prefix, number, present):
                return
        elif spec.drop or (spec.optional and spec.same_as):
            return
        names = tuple(hf_prefix + _fill(name, number) for name in spec.hf)
        same_as = _fill(spec.same_as, number) if spec.same_as else None
        if "{E}" not in spec.param and not any("{E}" in name for name in spec.hf):
            yield Row(spec, site.mcore, index, layer if index is not None else None, None, names, same_as)
            return
        for e in range(experts):
            text = str(e)
            own = names if spec.stacked else tuple(name.replace("{E}", text) for name in names)
            yield Row(spec, site.mcore, index, layer if index is not None else None, e, own, same_as)

    @staticmethod
    def _found(spec: RowSpec, hf_prefix: str, number: Mapping[str, str], present: Collection[str]) -> bool:
        return all(hf_prefix + _fill(name, number).replace("{E}", "0") in present for name in spec.hf)


def _fill(template: str, number: Mapping[str, str]) -> str:
    for placeholder, text in number.items():
        template = template.replace(placeholder, text)
    return template


def parse_table(name: str, text: str) -> Table:
    """Table from TOML text; every malformed part is a TableError naming table, section and row."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TableError(f"{name}: {error}") from error
    parser = _Parser(name)
    parser.keys("the table", raw, _TOP_KEYS)
    gamma = parser.strings("gamma", raw.get("gamma", {}))
    for side, convention in gamma.items():
        if side not in ("hf", "mcore") or convention not in GAMMA:
            parser.fail("gamma", f"`{side} = {convention!r}`; sides are hf, mcore, conventions zero, one")
    blocks = {}
    for block, rows in parser.mapping("rows", raw.get("rows")).items():
        entries = parser.mapping(f"rows.{block}", rows)
        blocks[block] = tuple(
            parser.alternatives(f"rows.{block}", param, spec, gamma) for param, spec in entries.items()
        )
    sites = tuple(parser.site(site, spec, blocks) for site, spec in parser.mapping("sites", raw.get("sites")).items())
    when = parser.strings("when", raw.get("when", {}))
    for block in when:
        if block not in blocks:
            parser.fail("when", f"`{block}` is not a block of [rows]")
    unused = set(blocks) - {block for site in sites for block in site.blocks}
    if unused:
        parser.fail("rows", f"no site uses {', '.join(sorted(unused))}")
    family = raw.get("mcore", "gpt")
    if family not in FAMILIES:
        parser.fail("mcore", f"{family!r} is not one of {', '.join(FAMILIES)}")
    return Table(
        name=name,
        digest=sha256(text.encode()).hexdigest(),
        model_types=parser.string_list("model_types", raw.get("model_types")),
        architectures=parser.string_list("architectures", raw.get("architectures", [])),
        family=family,
        notes=str(raw.get("notes", "")),
        unsupported=str(raw.get("unsupported", "")),
        experts=raw.get("experts", 0),
        config=parse_config(name, raw.get("config", {})),
        dims=parser.numbers("dims", raw.get("dims", {})),
        sites=sites,
        when=when,
        blocks=blocks,
        codecs=parser.strings("codecs", raw.get("codecs", {})),
    )


@dataclass(frozen=True, slots=True)
class _Parser:
    """Turns parsed TOML into table parts; every failure names the table and the place."""

    table: str

    def fail(self, place: str, message: str) -> None:
        raise TableError(f"{self.table}: [{place}]: {message}")

    def keys(self, place: str, value: Mapping[str, object], allowed: frozenset[str]) -> None:
        if unknown := sorted(set(value) - allowed):
            self.fail(
                place, f"unknown key {', '.join(f'`{k}`' for k in unknown)}; known: {', '.join(sorted(allowed))}"
            )

    def mapping(self, place: str, value: object) -> dict[str, object]:
        if not isinstance(value, dict):
            raise TableError(f"{self.table}: [{place}] is missing or not a table")
        return value

    def strings(self, place: str, value: object) -> dict[str, str]:
        entries = self.mapping(place, value)
        for key, text in entries.items():
            if not isinstance(text, str):
                self.fail(place, f"`{key}` must be a string, got {text!r}")
        return {key: str(text) for key, text in entries.items()}

    def numbers(self, place: str, value: object) -> dict[str, str | int]:
        """Entries that are whole numbers or expressions."""
        entries: dict[str, str | int] = {}
        for key, number in self.mapping(place, value).items():
            if isinstance(number, bool) or not isinstance(number, str | int):
                raise TableError(f"{self.table}: [{place}]: `{key}` must be a number or an expression, got {number!r}")
            entries[key] = number
        return entries

    def string_list(self, place: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TableError(f"{self.table}: `{place}` must be a list of strings, got {value!r}")
        return tuple(value)

    def site(self, name: str, value: object, blocks: Collection[str]) -> Site:
        place = f"sites.{name}"
        spec = self.mapping(place, value)
        self.keys(place, spec, _SITE_KEYS)
        used = self.string_list(f"{place}.rows", spec.get("rows"))
        for block in used:
            if block not in blocks:
                self.fail(place, f"block `{block}` has no [rows.{block}]")
        bounds = self.numbers(place, {"first": spec.get("first", 0), "n": spec.get("n", 1)})
        optional = self.flag(place, "optional", spec.get("optional", False))
        hf, mcore = str(spec.get("hf", "")), str(spec.get("mcore", ""))
        return Site(name, hf, mcore, bounds["first"], bounds["n"], used, optional)

    def flag(self, place: str, key: str, value: object) -> bool:
        """A truth value."""
        if not isinstance(value, bool):
            raise TableError(f"{self.table}: [{place}]: `{key}` must be true or false, got {value!r}")
        return value

    def alternatives(self, place: str, param: str, value: object, gamma: Mapping[str, str]) -> tuple[RowSpec, ...]:
        options = value if isinstance(value, list) else [value]
        if not options:
            self.fail(place, f"`{param}` has no row")
        return tuple(self.row(place, param, option, gamma) for option in options)

    def row(self, place: str, param: str, value: object, gamma: Mapping[str, str]) -> RowSpec:
        where = f"{place}.{param!r}"
        spec: dict[str, object] = {"copy": value} if isinstance(value, str) else self.mapping(where, value)
        ops = [key for key in spec if key in OPS]
        self.keys(where, spec, _ROW_KEYS | frozenset(OPS))
        if "same_as" in spec or "drop" in spec:
            if ops:
                self.fail(where, "a repeated or dropped tensor takes no op")
            hf: object = spec.get("hf", spec.get("drop"))
            op = "copy"
        elif len(ops) != 1:
            self.fail(where, f"exactly one op is needed, got {ops or 'none'}; ops are {', '.join(sorted(OPS))}")
        else:
            op, hf = ops[0], spec[ops[0]]
        hf = [hf] if isinstance(hf, str) else hf
        names = self.string_list(where, hf)
        for text in (param, *names):
            if unknown := set(re.findall(r"\{[^}]*\}", text)) - {"{L}", "{I}", "{E}"}:
                self.fail(where, f"unknown placeholder {', '.join(sorted(unknown))}; known are {{L}}, {{I}}, {{E}}")
        if any("{E}" in name for name in names) and "{E}" not in param and "drop" not in spec:
            self.fail(where, "a tensor per expert needs `{E}` in the Megatron Core name")
        hf_gamma = str(spec.get("hf_gamma", gamma.get("hf", "one")))
        if hf_gamma not in GAMMA:
            self.fail(where, f"hf_gamma = {hf_gamma!r}; conventions are zero, one")
        mcore_gamma = gamma.get("mcore", "one")
        dtype = spec.get("dtype")
        if dtype not in (None, "fp32"):
            self.fail(where, f"dtype = {dtype!r}; only fp32 can be asked for")
        flags = {key: self.flag(where, key, spec.get(key, False)) for key in ("transpose", "keep_dtype", "optional")}
        return RowSpec(
            param=param,
            op=op,
            hf=names,
            transpose=flags["transpose"],
            shift=GAMMA[mcore_gamma] - GAMMA[hf_gamma] if op == "norm" else 0,
            dtype="F32" if dtype else None,
            keep_dtype=flags["keep_dtype"],
            when=str(spec["when"]) if "when" in spec else None,
            optional=flags["optional"] or "drop" in spec,
            same_as=str(spec["same_as"]) if "same_as" in spec else None,
            drop="drop" in spec,
        )
