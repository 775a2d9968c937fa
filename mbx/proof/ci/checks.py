"""The conversion checks that a `mbx-ci.toml` lists:

[defaults]                      # each may be set again in a check
legs = ["cover", "config", "weights", "round-trip", "forward"]
layouts = [{}, { tp = 2, pp = 2 }]

[[check]]                       # convert at every layout, verify, convert back, verify
name = "llama"
source = "fixtures/tiny/llama"

[[check]]                       # a shipped table, on a small model that Transformers makes
source = "qwen3"

[[check]]                       # two checkpoints that somebody else made
name = "ours"
left = "meta-llama/Llama-3.2-1B"
right = "ckpt"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from converters.errors import StorageError, UsageError
from converters.mcore.layout import Layout
from mbx.run.job import DEFAULT_MAX_MEMORY
from mbx.text import parse_memory
from mbx.untrusted.small_files import SETTINGS, read_text
from mbx.untrusted.toml_files import parse_toml

LEGS = ("cover", "config", "weights", "round-trip", "forward", "loss")
_LAYOUT_TYPES = {field.name: str if field.name == "pipeline" else int for field in fields(Layout)}
_TEXT = ("a string", lambda value: isinstance(value, str))
_COUNT = ("a whole number from 1 on", lambda value: isinstance(value, int) and type(value) is not bool and value >= 1)
#: What each key takes, in words, and whether a value is that.
_KEYS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "allow_gaps": (
        "a list of globs",
        lambda value: _is_list(value, lambda glob: isinstance(glob, str)),
    ),
    **dict.fromkeys("name source left right mapping dtype format device max_memory".split(), _TEXT),
    "allow_unused_key": ("a list of keys", lambda value: _is_list(value, lambda entry: isinstance(entry, str))),
    "prompts": _COUNT,
    "tokens": _COUNT,
    "tolerance": (
        "a finite number from 0 on",
        lambda value: isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf,
    ),
    "legs": (f"a list of {', '.join(LEGS)}", lambda value: _is_list(value, LEGS.__contains__)),
    "layouts": (
        "a list like [{}, { tp = 2, pp = 2 }]",
        lambda value: _is_list(value, lambda entry: isinstance(entry, dict)),
    ),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One entry of the file: `source` is converted at every layout, or `left` and `right` are compared as they are."""

    name: str
    legs: tuple[str, ...]
    source: str | None = None
    left: str | None = None
    right: str | None = None
    layouts: tuple[Layout, ...] = (Layout(),)
    mapping: str | None = None
    dtype: str | None = None
    allow_unused_key: tuple[str, ...] = ()
    format: str = "torch_dist"
    tolerance: float | None = None
    prompts: int = 1
    tokens: int = 32
    device: str = "cpu"
    max_memory: int = DEFAULT_MAX_MEMORY
    allow_gaps: tuple[str, ...] = ()


def read_checks(path: Path) -> tuple[Check, ...]:
    """The checks of a `mbx-ci.toml`; UsageError names the check and the key, StorageError a file that is not there."""
    try:
        raw = parse_toml(read_text(path, SETTINGS))
    except FileNotFoundError:
        raise StorageError(f"there is no `{path}`", hint="docs/ci.md has one to start from") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"`{path}` cannot be read: {error}") from error
    if unknown := sorted(set(raw) - {"defaults", "check"}):
        raise UsageError(f"`{path}`: unknown section {', '.join(unknown)}", hint="there are [defaults] and [[check]]")
    defaults, entries = raw.get("defaults", {}), raw.get("check", [])
    if not isinstance(defaults, dict) or not isinstance(entries, list) or not entries:
        raise UsageError(f"`{path}` has no [[check]]: nothing would be tested")
    checks = tuple(_check(f"`{path}`, check {number}", defaults, entry) for number, entry in enumerate(entries, 1))
    names = [check.name for check in checks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"`{path}`: two checks are called {twice[0]!r}")
    return checks


def _check(where: str, defaults: Mapping[str, object], entry: object) -> Check:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is no table")
    values = {key: value for key, value in {**defaults, **entry}.items() if value != ""}
    if unknown := sorted(set(values) - set(_KEYS)):
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}", hint=f"keys: {', '.join(sorted(_KEYS))}")
    for key, value in values.items():
        expected, fits = _KEYS[key]
        if not fits(value):
            raise UsageError(f"{where}: {key} = {value!r}; {expected} was expected")
    named = [key for key in ("source", "left", "right") if key in values]
    if named not in (["source"], ["left", "right"]):
        raise UsageError(f"{where}: it needs `source`, or `left` and `right`; it has {', '.join(named) or 'neither'}")
    alone = named == ["source"]
    if not alone and (idle := sorted({"layouts", "format"} & set(entry))):
        raise UsageError(f"{where}: {', '.join(idle)} with `left` and `right`, which are compared as they are")
    returns = alone and "dtype" not in values  # a cast does not come back
    legs = values.get("legs", [leg for leg in LEGS[: 5 if alone else 3] if returns or leg != "round-trip"])
    if "round-trip" in legs and not returns:
        raise UsageError(f"{where}: a round trip needs `source`, and no `dtype`")
    values |= {"allow_unused_key": tuple(values.get("allow_unused_key", ()))}
    values |= {"legs": tuple(legs), "layouts": _layouts(where, values.get("layouts", [{}]))}
    values["allow_gaps"] = tuple(values.get("allow_gaps", ()))
    if "max_memory" in values:
        values["max_memory"] = parse_memory(values["max_memory"])
    return Check(**{"name": Path(values[named[0]]).name, **values})


def _is_list(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(fits, value))


def _layouts(where: str, entries: list[dict[str, object]]) -> tuple[Layout, ...]:
    for entry in entries:
        if unknown := sorted(set(entry) - set(_LAYOUT_TYPES)):
            raise UsageError(f"{where}: a layout has no {unknown[0]!r}", hint=f"it has {', '.join(_LAYOUT_TYPES)}")
        for key, size in entry.items():
            if type(size) is not _LAYOUT_TYPES[key]:
                wanted = "a string" if key == "pipeline" else "a whole number"
                raise UsageError(f"{where}: layout {key} = {size!r}; {wanted} was expected")
    return tuple(Layout(**entry) for entry in entries)  # type: ignore[arg-type]


def described(layout: Layout) -> str:
    """A layout by what is not its default: `tp2 pp2`, or `tp1`."""
    parts = [
        f"{field.name}{getattr(layout, field.name)}"
        for field in fields(Layout)
        if getattr(layout, field.name) != field.default
    ]
    return " ".join(parts) or "tp1"
