"""Drafts a mapping table for a new architecture from rows that shipped tables already know.

The closest shipped table gives the frame; its rows stay where the checkpoint has their tensors, rows of other
tables fill gaps, and what nothing places is listed in comments. The draft is a starting point: it is exact once
`mbx models check` passes and the forward leg agrees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from converters.errors import UnsupportedError, UsageError
from converters.rows.config_map import ConfigTable, parse_config
from converters.rows.config_spelling import GENERIC_KEYS, canonical, model_type_of
from converters.rows.expr import Value
from converters.rows.flags import idle_flags
from converters.rows.inheritance import whole
from converters.rows.isos import FIELDS
from converters.rows.ops import OPS
from converters.toml import tomllib
from mappings import table_names, table_text
from mbx.text import printable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
#: Keys that name the function between the products of an MLP.
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
Raw = dict[str, object]


@dataclass(slots=True)
class Template:
    """Tensor names that differ in layer and expert only, and the layers that have them."""

    name: str
    layers: set[int] = field(default_factory=set)
    example: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted table: its TOML text, the donor it follows, and what no row places."""

    text: str
    donor: str
    unplaced_tensors: tuple[str, ...]
    unplaced_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a shipped table as TOML wrote it, with full Hugging Face name templates."""

    table: str
    site: str
    block: str
    param: str
    spec: object
    hf: tuple[str, ...]


def templates(names: Iterable[str]) -> dict[str, Template]:
    """Names grouped by what is left when the first number becomes `{L}` and the second `{E}`."""
    found: dict[str, Template] = {}
    for name in names:
        numbers = [int(n) for n in _NUMBER.findall(name)]
        text = _NUMBER.sub("{E}", _NUMBER.sub("{L}", name, count=1), count=1)
        template = found.setdefault(text, Template(text, example=name))
        template.layers.update(numbers[:1])
    return found


def draft(config: Mapping[str, Value], tensors: Iterable[str]) -> Draft:
    """Draft a table for a checkpoint of these tensor names; UnsupportedError where no shipped table comes close."""
    present = templates(tensors)
    every = {name: whole(name, tomllib.loads(table_text(name))) for name in table_names()}
    raw = {name: table for name, table in every.items() if "text" not in table}  # towers around one draft nothing
    rows = [row for name, table in raw.items() for row in _rows(name, table)]
    score = {name: len({hf for row in rows if row.table == name for hf in row.hf if hf in present}) for name in raw}
    donor = max(score, key=lambda name: (score[name], _fit(name, raw[name], config)))
    if not score[donor]:
        raise UnsupportedError(
            f"no shipped table has a tensor name in common with this checkpoint ({len(present)} name patterns)",
            hint="write a table by hand: docs/add-a-model.md",
        )
    order = sorted(raw, key=lambda name: -score[name])
    kept = [row for row in rows if row.table == donor and all(hf in present for hf in row.hf)]
    placed = {hf for row in kept for hf in row.hf}
    taken = {(row.site, row.param) for row in kept}
    for row in sorted((r for r in rows if r.table != donor), key=lambda r: order.index(r.table)):
        if all(hf in present and hf not in placed for hf in row.hf) and (row.site, row.param) not in taken:
            kept.append(row)
            placed.update(row.hf)
            taken.add((row.site, row.param))
    unplaced = [present[name] for name in present if name not in placed]
    text, unknown_keys = _write(raw, donor, kept, present, canonical(config), config)
    text += _comment("tensors no known row places", [f"{t.name}   e.g. {t.example}" for t in unplaced])
    return Draft(text, donor, tuple(t.name for t in unplaced), tuple(unknown_keys))


def _fit(name: str, table: Raw, config: Mapping[str, Value]) -> int:
    """Config keys a table shares with the checkpoint, less what it would have to assume.

    A constant weighs more than an expression: it is some other model's value. Fields that its class always has are
    assumed as well.
    """
    (_, parsed), present = _config_of(name, table), set(canonical(config))
    assumed = [row.otherwise for row in parsed.rows if row.hf.split(".")[0] not in present]
    return (
        len(parsed.known_keys() & present)
        - sum(1 if isinstance(value, str) else 2 for value in assumed)
        - len(parsed.fixed)
    )


def _config_of(name: str, table: Raw) -> tuple[dict[str, object], ConfigTable]:
    """A table's `[config]` as TOML wrote it, and parsed."""
    section = table["config"]
    assert isinstance(section, dict)
    return section, parse_config(name, section)


def _rows(name: str, table: Raw) -> Iterable[_Row]:
    sites, blocks = table["sites"], table["rows"]
    assert isinstance(sites, dict) and isinstance(blocks, dict)
    for site, spec in sites.items():
        for block in spec["rows"]:
            for param, value in blocks[block].items():
                for option in value if isinstance(value, list) else [value]:
                    names = _names(option)
                    if names and {"drop", "beside"}.isdisjoint(option if isinstance(option, dict) else ()):
                        yield _Row(name, site, block, param, option, tuple(spec.get("hf", "") + n for n in names))


def _names(option: object) -> list[str]:
    if isinstance(option, str):
        return [option]
    assert isinstance(option, dict)
    value: str | list[str] = next((option[key] for key in option if key in OPS or key == "hf"), [])
    return [value] if isinstance(value, str) else [str(name) for name in value]


def _op(option: object) -> str:
    return next((key for key in option if key in OPS), "copy") if isinstance(option, Mapping) else "copy"


def _write(
    raw: Mapping[str, Raw],
    donor: str,
    kept: list[_Row],
    present: Mapping[str, Template],
    config: Mapping[str, Value],
    original: Mapping[str, Value],
) -> tuple[str, list[str]]:
    frame, sources = raw[donor], dict.fromkeys([donor, *(row.table for row in kept)])
    lines = [
        f"# Drafted from `{donor}`; check every row, then `mbx models check`",
        f"model_types   = {_toml([model_type_of(original)])}",
        f"architectures = {_toml(original.get('architectures') or [])}",
        f"mcore         = {_toml(frame.get('mcore', 'gpt'))}",
    ]
    lines += [f"{key} = {_toml(frame[key])}" for key in ("experts", "gamma") if key in frame]
    lines += [f"unsupported = {_toml(why)}" for name in sources if (why := raw[name].get("unsupported"))][:1]
    ops: dict[str, set[str]] = {}
    for row in kept:
        ops.setdefault(row.param, set()).add(_op(row.spec))
    config_lines, unknown, odd = _config(raw, donor, config, ops)
    lines += ["", *config_lines]
    lines += _section("dims", frame.get("dims", {}))
    blocks: dict[tuple[str, str], list[_Row]] = {}
    for row in kept:
        blocks.setdefault((row.site, row.block if row.table == donor else f"{row.block}_{row.table}"), []).append(row)
    lines += _sites(frame, blocks) + _when(frame, blocks, present, donor)
    written = set()
    for (_, block), rows in blocks.items():
        if block in written:
            continue
        written.add(block)
        by_param: dict[str, list[object]] = {}
        for row in rows:
            by_param.setdefault(row.param, []).append(row.spec)
        lines += ["", f"[rows.{block}]"]
        lines += [f"{_toml(p)} = {_toml(specs[0] if len(specs) == 1 else specs)}" for p, specs in by_param.items()]
    text = "\n".join(lines) + "\n" + _comment(f"fields that `{donor}` has, and nothing here speaks for", odd)
    return text + _comment("config keys no known table maps", unknown), unknown


def _config(
    raw: Mapping[str, Raw], donor: str, config: Mapping[str, Value], rows: Mapping[str, set[str]]
) -> tuple[list[str], list[str], list[str]]:
    """`[config]` in lines, the keys it leaves, and the donor's fields that it leaves out.

    A donor's word on a key holds for the donor's class. It is taken over where the checkpoint's config fulfils what
    it was said under: a value that is required, a key that is idle while another has its value. What no class reads
    is ignored, a switch that is off is required off, and everything else is left for a reader of the class.
    """
    section, parsed = _config_of(donor, raw[donor])
    tables = {name: _config_of(name, table) for name, table in raw.items()}
    lines = ["[config]"]
    for row in parsed.rows:
        if row.hf.split(".")[0] in config or row.otherwise is not None:
            lines.append(f"{_key(row.mcore)} = {_toml(section[row.mcore])}")
    held = {key for key, value in parsed.require.items() if config.get(key) == value}
    require = {key: value for key, value in parsed.require.items() if key not in config or key in held}
    via = dict(parsed.groups)
    placed = {row.hf.split(".")[0] for row in parsed.rows} | {key for keys in via.values() for key in keys} | held
    idle = {key: [k for k in keys if k in config] for key, keys in parsed.idle.items() if key in held}
    placed = placed.union(GENERIC_KEYS, *idle.values())
    left = [key for key in config if key not in placed]
    fields = {row.mcore for row in parsed.rows} | set(parsed.fixed) | {f for name in via for f in FIELDS[name].mcore}
    for other_section, other in tables.values():
        for row in other.rows:
            if row.hf in left and row.mcore not in fields:
                lines.append(f"{_key(row.mcore)} = {_toml(_without_default(other_section[row.mcore]))}")
                fields.add(row.mcore)
                left.remove(row.hf)
        for name, keys in other.groups.items():
            # several keys together are one class's reading of them
            if len(keys) == 1 and keys[0] in left and fields.isdisjoint(FIELDS[name].mcore) and _takes(name, config):
                via[name] = keys
                fields |= set(FIELDS[name].mcore)
                left.remove(keys[0])
    read = set().union(*(other.known_keys() - other.ignore for _, other in tables.values()))
    ignored = set().union(*(other.ignore for _, other in tables.values())) - read
    ignore = sorted(key for key in left if key in ignored)
    off = [key for key in left if not config[key] and any(key in other.require for _, other in tables.values())]
    require |= {key: config[key] for key in off}
    left = [key for key in left if key not in ignored and key not in off]
    odd = idle_flags(parsed.fixed, rows)
    if any(key in left for key in _ACTIVATIONS):
        odd.append("activation_func")
    fixed = {field: value for field, value in parsed.fixed.items() if field not in odd}
    lines += [f"ignore = {_toml(ignore)}"] if ignore else []
    sections: dict[str, object] = {"via": via, "require": require, "idle": idle, "fixed": fixed}
    for name, values in sections.items():
        lines += _section(f"config.{name}", values)
        if name == "fixed":
            lines.insert(-len(fixed), f"# `{donor}` always has these; of another class only the forward leg tells")
    said = [f"{field} = {_toml(parsed.fixed[field])}" for field in odd if field in parsed.fixed]
    return lines, [f"{key} = {json.dumps(config[key])}" for key in left], said


def _takes(group: str, config: Mapping[str, Value]) -> bool:
    """Whether a registered conversion expresses what a config says."""
    try:
        return bool(FIELDS[group].to_mcore(config))
    except UsageError:
        return False


def _without_default(spec: object) -> object:
    """A row of another table without what holds there where the key is absent."""
    return {key: value for key, value in spec.items() if key != "else"} if isinstance(spec, Mapping) else spec


def _sites(frame: Raw, blocks: Mapping[tuple[str, str], list[_Row]]) -> list[str]:
    lines = ["", "[sites]"]
    sites = frame["sites"]
    assert isinstance(sites, dict)
    for site, spec in sites.items():
        used = list(dict.fromkeys(block for name, block in blocks if name == site))
        if used:
            lines.append(f"{site} = {_toml({**spec, 'rows': used})}")
    return lines


def _when(
    frame: Raw, blocks: Mapping[tuple[str, str], list[_Row]], present: Mapping[str, Template], donor: str
) -> list[str]:
    """Conditions of the donor's blocks, and for borrowed blocks the layers where their tensors are."""
    known = frame.get("when", {})
    assert isinstance(known, dict)
    lines, every = [], set().union(*(t.layers for t in present.values()))
    for _, block in dict.fromkeys(blocks):
        rows = next(rows for key, rows in blocks.items() if key[1] == block)
        if rows[0].table == donor:
            if block in known:
                lines.append(f"{block} = {_toml(known[block])}")
            continue
        layers = set().union(*(present[hf].layers for row in rows for hf in row.hf))
        if layers and layers != every:
            lines.append(f"{block} = {_toml(_condition(layers, every))}")
    return ["", "[when]", *dict.fromkeys(lines)] if lines else []


def _condition(layers: set[int], every: set[int]) -> str:
    first, last = min(layers), max(layers)
    if layers == set(range(first, last + 1)):
        return (
            f"L < {last + 1}" if first == 0 else f"L >= {first}" if last == max(every) else f"{first} <= L <= {last}"
        )
    return f"L in {sorted(layers)}"


def _section(name: str, values: object) -> list[str]:
    assert isinstance(values, Mapping)
    return ["", f"[{name}]", *(f"{_key(k)} = {_toml(v)}" for k, v in values.items())] if values else []


def _comment(title: str, entries: list[str]) -> str:
    """Entries a line each: names of a checkpoint may hold line breaks, and what follows one is no comment."""
    shown = map(printable, entries)
    return "".join([f"\n# {title}:\n", *(f"#   {entry}\n" for entry in shown)]) if entries else ""


def _toml(value: object) -> str:
    """`value` in TOML on one line; JSON strings, numbers and truth values are TOML already."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, float) and value == int(value) and "e" not in repr(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
