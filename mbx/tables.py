"""Finds the mapping table of a checkpoint: the user's own file, or the shipped one of its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from converters.errors import StorageError, UnsupportedError, UsageError
from converters.rows.expr import Value
from converters.rows.parse import parse_table
from converters.rows.table import Table
from mappings import table_names, table_text
from mbx.untrusted.small_files import SETTINGS, read_text


@cache
def shipped(name: str) -> Table:
    """The shipped table `name`; UsageError with near misses when there is none."""
    try:
        return parse_table(name, table_text(name))
    except KeyError:
        close = get_close_matches(name, table_names(), n=3)
        raise UsageError(
            f"there is no table `{name}`",
            hint=f"did you mean {', '.join(close)}?" if close else "`mbx models list` shows all",
        ) from None


def from_file(path: Path) -> Table:
    """A user's own table."""
    try:
        return parse_table(path.stem, read_text(path, SETTINGS))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the table `{path}`: {error}") from error


def table_for(config: Mapping[str, Value], mapping: str | None = None) -> Table:
    """The table for a Hugging Face config: `mapping` (a file or a shipped name) or by `model_type`.

    A model that holds a text model beside a vision tower is known by the text model's type and its own class.
    UnsupportedError when no table knows the architecture.
    """
    if mapping is not None:
        return from_file(Path(mapping)) if mapping.endswith(".toml") else shipped(mapping)
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    model_type, architectures = inner or config.get("model_type"), config.get("architectures") or []
    # Parsing every table would cost more than a small conversion: look for the quoted model type first.
    candidates = [shipped(name) for name in table_names() if f'"{model_type}"' in table_text(name)]
    fits = [t for t in candidates if model_type in t.model_types]
    if not isinstance(architectures, list):
        raise UsageError(f"config.json: `architectures` is {architectures!r}, a list was expected")
    exact = [t for t in fits if set(t.architectures) & set(map(str, architectures))]
    chosen = exact or [t for t in fits if not architectures]
    if chosen:
        return chosen[0]
    if inner and fits:
        raise UnsupportedError(
            f"no table for {', '.join(map(str, architectures)) or 'this class'} around a {inner!r} text model",
            hint=f"the table `{fits[0].name}` covers that text model in a repository of its own; add a [wrapped] "
            "section with this class's beginnings of names to a copy of it and give that as ‹mapping› FILE",
        )
    known = sorted({kind for name in table_names() for kind in shipped(name).model_types})
    close = get_close_matches(str(model_type), known, n=3)
    raise UnsupportedError(
        f"no table for model_type {model_type!r} with architectures {architectures}",
        hint=f"near: {', '.join(close)}; `mbx models new SRC` drafts a table, ‹mapping› FILE uses it"
        if close
        else "`mbx models list` shows what is covered; ‹mapping› FILE uses a table of your own",
    )
