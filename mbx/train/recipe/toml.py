"""A recipe's plain values as TOML text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

#: Keys that need no quotes.
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dump_toml(recipe: Mapping[str, object]) -> str:
    """TOML text of nested plain values; what is empty by being a table without keys is left out."""
    return "\n".join(_section(recipe, ())).lstrip("\n") + "\n"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def _section(values: Mapping[str, object], path: tuple[str, ...]) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if plain and path:
        yield from ("", f"[{'.'.join(map(_key, path))}]")
    for key, value in plain.items():
        # JSON's text of a boolean, a number, a string or a list of them is TOML's
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        yield f"{_key(key)} = {text}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _section(value, (*path, key))
