"""mbx's mapping tables, one TOML file an architecture; plain data that loads without torch."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def table_names() -> tuple[str, ...]:
    """Names of the shipped tables."""
    names = (path.name for path in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@cache
def table_text(name: str) -> str:
    """TOML text of a shipped table; KeyError when there is none of that name."""
    path = files(__name__) / f"{name}.toml"
    if not path.is_file():
        raise KeyError(name)
    return path.read_text(encoding="utf-8")
