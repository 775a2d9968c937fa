"""Reads a mapping table from TOML; every malformed part is an error that names table, section and row.

Grammar (see docs/add-a-model.md): `[sites]` say where blocks repeat, `[when]` at which layers, `[rows.BLOCK]`
pair one Megatron Core parameter with its Hugging Face tensors under an op. `{L}` is the global layer,
`{I}` the index within the site, `{E}` the expert. A table with `[text]` takes the text model's rows from another table
and has rows of what stands beside that, the towers, alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from converters.errors import TableError
from converters.rows.config_map import parse_config
from converters.rows.inheritance import shipped_text, whole
from converters.rows.ops import ACROSS, OPS
from converters.rows.row import NO_STATE
from converters.rows.table import Arrangement, Kind, RowSpec, Site, Table
from converters.toml import tomllib

GAMMA = {"zero": 0, "one": 1}
FAMILIES = ("gpt", "hybrid", "dit")
_TOP_KEYS = frozenset(
    """model_types architectures mcore notes unsupported extends names experts gamma config text towers kept flavours
    dims kinds sites when rows""".split()
)
_ROW_KEYS = frozenset(
    "transpose unsqueeze hf_gamma dtype keep_dtype when optional same_as drop beside hf state last".split()
)
_FLAGS = ("transpose", "unsqueeze", "keep_dtype", "optional")
_SITE_KEYS = frozenset("hf mcore first n rows optional part when outer".split())
_TEXT_KEYS = frozenset("table names rows".split())
_FLAVOUR_KEYS = frozenset("text kept sites".split())
#: What stands before the text model's names in most tools' checkpoints.
_PREFIX = "language_model."


def parse_table(name: str, text: str) -> Table:
    """Table from TOML text; every malformed part is a TableError naming table, section and row."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{name}: {error}") from error
    parser = _Parser(name)
    parser.keys("the table", raw, _TOP_KEYS)
    if "towers" in raw:
        parser.keys("towers", parser.mapping("towers", raw["towers"]), frozenset(("table",)))
    raw = whole(name, raw)
    gamma = parser.strings("gamma", raw.get("gamma", {}))
    for side, convention in gamma.items():
        if side not in ("hf", "mcore") or convention not in GAMMA:
            parser.fail("gamma", f"`{side} = {convention!r}`; sides are hf, mcore, conventions zero, one")
    around = "text" in raw
    blocks = {}
    for block, rows in parser.mapping("rows", raw.get("rows", {} if around else None)).items():
        entries = parser.mapping(f"rows.{block}", rows)
        blocks[block] = tuple(
            parser.alternatives(f"rows.{block}", param, spec, gamma) for param, spec in entries.items()
        )
    places = parser.mapping("sites", raw.get("sites", {} if around else None))
    sites = tuple(parser.site(site, spec, blocks) for site, spec in places.items())
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
    table = Table(
        name=name,
        model_types=parser.string_list("model_types", raw.get("model_types")),
        architectures=parser.string_list("architectures", raw.get("architectures", [])),
        family=family,
        notes=str(raw.get("notes", "")),
        unsupported=str(raw.get("unsupported", "")),
        experts=raw.get("experts", 0),
        config=parse_config(name, raw.get("config", {})),
        dims=parser.numbers("dims", raw.get("dims", {})),
        kinds={kind: parser.kind(kind, said) for kind, said in parser.mapping("kinds", raw.get("kinds", {})).items()},
        sites=sites,
        when=when,
        blocks=blocks,
        wrapped=parser.ways("names", raw.get("names", [])),
        kept={} if around else parser.strings("kept", raw.get("kept", {})),
    )
    return parser.around(table, raw, gamma) if around else table


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

    def ways(self, place: str, value: object) -> tuple[dict[str, str], ...]:
        """Ways to begin names, none of them empty."""
        if not isinstance(value, list) or not all(value):
            self.fail(place, f"must be a list of tables, each from one beginning of names to another, got {value!r}")
        entries = value if isinstance(value, list) else []
        return tuple(self.strings(place, entry) for entry in entries)

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

    def kind(self, name: str, value: object) -> Kind:
        """Layers that have fields of their own."""
        place = f"kinds.{name}"
        said = self.mapping(place, value)
        if not isinstance(when := said.get("when"), str):
            raise TableError(f"{self.table}: [{place}]: `when` must say at which layers")
        return Kind(when, self.numbers(place, {field: of for field, of in said.items() if field != "when"}))

    def site(self, name: str, value: object, blocks: Collection[str]) -> Site:
        place = f"sites.{name}"
        spec = self.mapping(place, value)
        self.keys(place, spec, _SITE_KEYS)
        used = self.string_list(f"{place}.rows", spec.get("rows"))
        for block in used:
            if block not in blocks:
                self.fail(place, f"block `{block}` has no [rows.{block}]")
        bounds = self.numbers(place, {"first": spec.get("first", 0), "n": spec.get("n", 1)})
        optional, outer = (self.flag(place, key, spec.get(key, False)) for key in ("optional", "outer"))
        hf, mcore = str(spec.get("hf", "")), str(spec.get("mcore", ""))
        part = str(spec.get("part", ""))
        when = str(spec.get("when", ""))
        return Site(name, hf, mcore, bounds["first"], bounds["n"], used, optional, part=part, when=when, outer=outer)

    def around(self, own: Table, raw: Mapping[str, object], gamma: Mapping[str, str]) -> Table:
        """The table of a model with towers: `own` has their rows, `[text]` names the table of its text model."""
        said = self.mapping("text", raw["text"])
        self.keys("text", said, _TEXT_KEYS)
        text = parse_table(*shipped_text(self.table, "text", said.get("table")))
        blocks = {**text.blocks}
        for block, rows in self.mapping("text.rows", said.get("rows", {})).items():
            place = f"text.rows.{block}"
            if block not in blocks:
                self.fail(place, f"the table `{text.name}` has no such block")
            other = {p: self.alternatives(place, p, spec, gamma) for p, spec in self.mapping(place, rows).items()}
            blocks[block] = (*(row for row in blocks[block] if row[0].param not in other), *other.values())
        if twice := sorted(blocks.keys() & own.blocks.keys()):
            self.fail("rows", f"`{twice[0]}` is a block of the table `{text.name}` already")
        kept = self.strings("kept", raw.get("kept", {}))
        flavours = self.mapping("flavours", raw.get("flavours", {}))
        return replace(
            own,
            family=text.family,
            unsupported=own.unsupported or text.unsupported,
            experts=text.experts,
            config=text.config.extended(own.config),
            text_types=text.model_types,
            dims=text.dims,
            kinds=text.kinds,
            sites=text.sites,
            when={**text.when, **own.when},
            blocks={**blocks, **own.blocks},
            wrapped=self.ways("text.names", said.get("names", [])),
            towers=own.sites,
            kept=kept,
            part_dims=own.dims,
            flavours={name: self.flavour(name, spec, own, kept) for name, spec in flavours.items()},
        )

    def flavour(self, name: str, value: object, own: Table, kept: Collection[str]) -> Arrangement:
        """Where one tool puts the towers."""
        place = f"flavours.{name}"
        spec = self.mapping(place, value)
        self.keys(place, spec, _FLAVOUR_KEYS)
        held = self.strings(f"{place}.kept", spec.get("kept", {}))
        sites = self.string_list(f"{place}.sites", spec.get("sites", []))
        if odd := sorted({*held} - {*kept} | {*sites} - {site.name for site in own.sites}):
            self.fail(place, f"`{odd[0]}` is neither in [kept] nor in [sites]")
        return Arrangement(str(spec.get("text", _PREFIX)), sites, held)

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
        left_out = next((key for key in ("drop", "beside") if key in spec), "")
        if "same_as" in spec or left_out:
            if ops:
                self.fail(where, "a repeated or dropped tensor takes no op")
            hf: object = spec.get("hf", spec.get(left_out))
            op = "copy"
        elif len(ops) != 1:
            self.fail(where, f"exactly one op is needed, got {ops or 'none'}; ops are {', '.join(sorted(OPS))}")
        else:
            op, hf = ops[0], spec[ops[0]]
        hf = [hf] if isinstance(hf, str) else hf
        names = self.string_list(where, hf)
        if (" + " in param) != (op in ACROSS):
            self.fail(where, f"parameters with ` + ` between them are for {', '.join(ACROSS)}, and for nothing else")
        for text in (param, *names):
            if unknown := set(re.findall(r"\{[^}]*\}", text)) - {"{L}", "{I}", "{E}"}:
                self.fail(where, f"unknown placeholder {', '.join(sorted(unknown))}; known are {{L}}, {{I}}, {{E}}")
        if any("{E}" in name for name in names) and "{E}" not in param and not left_out:
            self.fail(where, "a tensor per expert needs `{E}` in the Megatron Core name")
        hf_gamma = str(spec.get("hf_gamma", gamma.get("hf", "one")))
        if hf_gamma not in GAMMA:
            self.fail(where, f"hf_gamma = {hf_gamma!r}; conventions are zero, one")
        mcore_gamma = gamma.get("mcore", "one")
        dtype = spec.get("dtype")
        if dtype not in (None, "fp32"):
            self.fail(where, f"dtype = {dtype!r}; only fp32 can be asked for")
        flags = {key: self.flag(where, key, spec.get(key, False)) for key in _FLAGS}
        return RowSpec(
            param=param,
            op=op,
            hf=names,
            transpose=flags["transpose"],
            unsqueeze=flags["unsqueeze"],
            shift=GAMMA[mcore_gamma] - GAMMA[hf_gamma] if op == "norm" else 0,
            dtype="F32" if dtype else None,
            keep_dtype=flags["keep_dtype"],
            when=str(spec["when"]) if "when" in spec else None,
            # a part that travels beside must be there where a condition says so; buffers come and go
            optional=flags["optional"] or left_out == "drop" or left_out == "beside" and "when" not in spec,
            same_as=str(spec["same_as"]) if "same_as" in spec else None,
            drop=bool(left_out),
            beside=left_out == "beside",
            state=NO_STATE if (said := spec.get("state", False)) == NO_STATE else self.flag(where, "state", said),
            last=self.numbers(f"{where}.last", spec.get("last", {})),
        )
