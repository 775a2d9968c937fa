"""What a table takes from another: all that it `extends`, or of `[towers]` what stands beside the text model.

Both work on parsed TOML, before anything in it means anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.errors import TableError
from converters.rows.isos import FIELDS
from converters.rows.ops import OPS
from converters.toml import tomllib
from mappings import table_names, table_text

Raw = Mapping[str, object]
#: Sections that say what stands beside a text model.
_OF_TOWERS = ("config", "kept", "flavours", "dims", "sites", "when", "rows")
#: What every table says of itself alone.
_OWN = frozenset({"model_types", "architectures", "notes", "unsupported"})
#: Parts of `[config]` that are no fields.
_PARTS = ("fixed", "require", "via", "idle", "ignore")


def shipped_text(table: str, place: str, name: object) -> tuple[str, str]:
    """Name and text of a shipped table that `table` refers to; TableError where there is none."""
    if not isinstance(name, str) or name not in table_names() or name == table:
        raise TableError(f"{table}: [{place}]: there is no table `{name}`")
    return name, table_text(name)


def whole(table: str, raw: Raw) -> dict[str, Any]:
    """`raw` with what it takes from the tables that it names by `extends` and by `[towers]`."""
    own: dict[str, Any] = dict(raw)
    if "extends" in own:
        name, text = shipped_text(table, "extends", own.pop("extends"))
        base = whole(name, tomllib.loads(text))
        own = _extended(table, own, {key: value for key, value in base.items() if key not in _OWN})
    if isinstance(said := own.pop("towers", None), Mapping):
        other = tomllib.loads(shipped_text(table, "towers", said.get("table"))[1])
        own = _over(own, {key: other[key] for key in _OF_TOWERS if key in other})
    return own


def _extended(table: str, own: Raw, base: Raw) -> dict[str, object]:
    """`own` over `base`, but for what of the config `own` says in another way, or is `without`.

    Rows and blocks of rows that are `[]` are left out.
    """
    mine, theirs = own.get("config"), base.get("config")
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        left = _without(table, theirs, mine.get("without", []))
        own = {**own, "config": {key: value for key, value in mine.items() if key != "without"}}
        base = {**base, "config": _unsaid(left, mine)}
    merged = _over(own, base)
    if isinstance(blocks := merged.get("rows"), Mapping):
        merged["rows"] = {
            block: {param: row for param, row in rows.items() if row != []} if isinstance(rows, Mapping) else rows
            for block, rows in blocks.items()
            if rows != []
        }
        gone = {block for block, rows in blocks.items() if rows == []}
        merged["when"] = {block: at for block, at in _part(merged, "when").items() if block not in gone}
    return merged


def _without(table: str, config: Raw, names: object) -> dict[str, object]:
    """`config` without the fields, groups and keys that are `names`; TableError for one that it has not."""
    parts = {part: _part(config, part) for part in ("fixed", "require", "via", "idle")}
    ignored = config.get("ignore", [])
    known = set(_rows(config)).union(*parts.values(), ignored if isinstance(ignored, list) else [])
    if not isinstance(names, list) or (unknown := [name for name in names if name not in known]):
        said = unknown[0] if isinstance(names, list) else names
        raise TableError(f"{table}: [config] `without`: the table it extends has no {said!r}")
    kept: dict[str, object] = {field: spec for field, spec in config.items() if field not in names}
    kept |= {part: {key: said for key, said in held.items() if key not in names} for part, held in parts.items()}
    return {**kept, "ignore": [key for key in ignored if key not in names] if isinstance(ignored, list) else ignored}


def _unsaid(config: Raw, own: Raw) -> dict[str, object]:
    """`config` without fields that `own` sets by another part of it, and without its word on keys that `own` reads."""
    own = {key: value for key, value in own.items() if key != "without"}
    fields = {*_rows(own), *_part(own, "fixed"), *(field for group in _part(own, "via") for field in _fields(group))}
    read = {str(spec.get("hf") if isinstance(spec, Mapping) else spec) for spec in _rows(own).values()}
    read = read.union(*map(_keys, _part(own, "via").values()))
    kept: dict[str, object] = {
        field: spec for field, spec in config.items() if field in _PARTS or field not in fields or field in own
    }
    kept["fixed"] = {
        field: value for field, value in _part(config, "fixed").items() if field not in fields - {*_part(own, "fixed")}
    }
    kept["via"] = {
        group: keys
        for group, keys in _part(config, "via").items()
        if group in _part(own, "via") or (fields.isdisjoint(_fields(group)) and read.isdisjoint(_keys(keys)))
    }
    kept["require"] = {key: value for key, value in _part(config, "require").items() if key not in read}
    return kept


def _rows(config: Raw) -> dict[str, object]:
    return {field: spec for field, spec in config.items() if field not in _PARTS}


def _part(config: Raw, name: str) -> Raw:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _keys(group: object) -> set[str]:
    """Hugging Face keys of a group."""
    return {group} if isinstance(group, str) else set(map(str, group)) if isinstance(group, list) else set()


def _fields(group: str) -> tuple[str, ...]:
    return FIELDS[group].mcore if group in FIELDS else ()


def _over(own: Raw, other: Raw) -> dict[str, object]:
    """`own` with the entries of `other` that it lacks, tables within tables too; ignored keys are put together."""
    out = {**other, **own}
    for key in own.keys() & other.keys():
        mine, theirs = own[key], other[key]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping) and not _is_entry(mine):
            out[key] = _over(mine, theirs)
        elif isinstance(mine, list) and isinstance(theirs, list) and key == "ignore":
            out[key] = [*theirs, *mine]
    return out


def _is_entry(table: Raw) -> bool:
    """Whether a table of TOML is one row, one field of the config or one site."""
    told = OPS.keys() | {"hf", "drop", "beside", "rows"}
    return any(key in told and not isinstance(value, Mapping) for key, value in table.items())
