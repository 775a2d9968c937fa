"""mbx's mapping tables, one TOML file an architecture; plain data that loads without torch."""

from __future__ import annotations

from importlib.resources import files


def table_names() -> list[str]:
    """Names of the shipped tables."""
    return sorted(path.name.removesuffix(".toml") for path in files(__name__).iterdir() if path.name.endswith(".toml"))


def table_text(name: str) -> str:
    """TOML text of a shipped table; KeyError when there is none of that name."""
    path = files(__name__) / f"{name}.toml"
    if not path.is_file():
        raise KeyError(name)
    return path.read_text(encoding="utf-8")
