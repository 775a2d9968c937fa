"""The reference of what Python code imports: signatures and docstrings of every public name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

_INTRO = """\
# Python names

<!-- Written by `make docs` from docstrings; edits here are lost. -->

What `mbx` and `mbx.live` offer, by name. [mbx in Python](../api.md) shows how it goes together,
[live models](../live.md) what `mbx.live` is for.
"""
_MODULES = ("mbx", "mbx.live")
#: Where an annotation says a private place, or a module's alias of a builtin.
_HOMES = re.compile(r"\b(?:mbx|converters|collections|pathlib|numpy|threading|typing)(?:\.\w+)*\.(?=\w)")


def page() -> str:
    """docs/reference/python.md; ValueError for a public name without a docstring."""
    lines = [_INTRO]
    for module in _MODULES:
        names = [name for name in import_module(module).__all__ if not name.startswith("__")]
        lines += [f"## {module}", ""]
        for name in sorted(names, key=str.lower):
            lines += _name(module, name, getattr(import_module(module), name))
    return "\n".join(lines)


def _name(module: str, name: str, value: object) -> Iterator[str]:
    yield f"### {module}.{name}"
    yield ""
    if inspect.isclass(value):
        yield from _class(name, value)
    else:
        yield from ("~~~~py", _signature(name, value), "~~~~", "", _docstring(value), "")


def _class(name: str, kind: type) -> Iterator[str]:
    """A class: its docstring, the fields of a dataclass, and its own public methods and properties."""
    parents = [base.__name__ for base in kind.__bases__ if base.__module__.startswith(("mbx", "converters"))]
    yield from (_docstring(kind), "")
    if parents:
        yield from (f"A kind of {', '.join(f'`{parent}`' for parent in parents)}.", "")
    if is_dataclass(kind):
        lines = [f"{field.name}: {field.type}" for field in fields(kind) if not field.name.startswith("_")]
        yield from ("~~~~text", *lines, "~~~~", "")
    for method, found in vars(kind).items():
        if method.startswith("_"):
            continue
        if isinstance(found, property):
            yield from (f"**`.{method}`**: {_docstring(found.fget)}", "")
        elif inspect.isfunction(found):
            yield from ("~~~~py", _signature(f".{method}", found), "~~~~", "", _docstring(found), "")


def _signature(name: str, value: object) -> str:
    text = str(inspect.signature(value)) if callable(value) else ""
    text = re.sub(r"<function .*? at 0x\w+>", "…", text)
    text = _HOMES.sub("", text.replace("'", "").replace("(self, ", "(").replace("(self)", "()"))
    if len(name) + len(text) <= 100:
        return name + text
    inside, _, end = text[1:].rpartition(")")
    parts = re.split(r", (?![^\[]*\])(?![^(]*\))", inside)
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def _docstring(value: object) -> str:
    text = inspect.getdoc(value)
    if not text:
        raise ValueError(f"{value!r} has no docstring")
    return re.sub(r"(?<!`)<(?=\w)", "&lt;", text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
