"""TOML of strangers: plain values, and integers that fit a machine."""

from __future__ import annotations

from converters.toml import tomllib
from mbx.untrusted.values import check_plain


def parse_toml(text: str) -> dict[str, object]:
    """The tables of a TOML text; ValueError, whose text says what is wrong, for anything else."""
    try:
        parsed: dict[str, object] = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("values nested too deep") from error
    check_plain(parsed)
    return parsed
