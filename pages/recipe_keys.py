"""The reference of recipe keys: types, ranges and defaults from the fields, meanings from recipe_keys.toml."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, get_args, get_origin

from mbx.train.recipe.parse import SECTIONS, field_types
from mbx.train.recipe.sections import Range, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MEANINGS = Path(__file__).with_suffix(".toml")
_INTRO = """\
# Recipe keys

<!-- Written by `make docs` from mbx/train/recipe/sections.py and pages/recipe_keys.toml; edits here are lost. -->

A recipe is a TOML file with these sections; on the command line a key reads `section.key=value`. `model=`, `data=`,
`steps=`, `lr=` and `lora=` are short for `model.path`, `data.path`, `train.steps`, `optim.lr` and `lora.rank`. An
unknown key is an error that names the nearest ones. `mbx train NAME --show` prints a shipped recipe
with overrides applied.
"""
_WORDS = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", tuple: "list", Mapping: "table"}


def meanings() -> dict[str, str]:
    """What each key means, by its dotted name."""
    sections = tomllib.loads(MEANINGS.read_text(encoding="utf-8"))
    return {f"{section}.{key}": text for section, keys in sections.items() for key, text in keys.items()}


def page() -> str:
    """docs/reference/recipe-keys.md; KeyError for a key without a meaning."""
    said, defaults = meanings(), Recipe().flat()
    lines = [_INTRO]
    for section in SECTIONS:
        lines += [f"## {section}", "", "| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        for name, kind in field_types(section).items():
            key = f"{section}.{name}"
            lines.append(f"| `{key}` | {takes(kind)} | {_default(defaults[key])} | {said[key]} |")
        lines.append("")
    return "\n".join(lines)


def takes(kind: object) -> str:
    """A key's type in words: choices, a number with its range, or one of several."""
    if isinstance(kind, UnionType):
        return " or ".join(dict.fromkeys(takes(one) for one in get_args(kind)))
    if get_origin(kind) is Annotated:
        number, limits = get_args(kind)
        return f"{_WORDS[number]}{_within(limits)}"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    return _WORDS[get_origin(kind) or kind]  # type: ignore[index]


def _within(limits: Range) -> str:
    low = "" if math.isinf(limits.low) else f" from {limits.low}"
    return low if math.isinf(limits.high) else f"{low} {'below' if limits.below else 'to'} {limits.high}"


def _default(value: object) -> str:
    if value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{','.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
