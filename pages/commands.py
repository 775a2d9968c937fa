"""The reference of the command line, from the commands themselves: what `--help` says, as a page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mbx.cli import app
from mbx.cli.options import EXIT_CODES

_INTRO = """\
# Commands

<!-- Written by `make docs` from the commands; edits here are lost. -->

Every command takes `--help`, `--json` (one document on stdout, errors included), `-q` (`--quiet`), `-qq` and `-v`
(`--verbose`), which are left out below. Results go to stdout, messages and errors to stderr.
"""
_COMMON = ("--help", "--json", "--quiet", "--verbose")


def page() -> str:
    """docs/reference/commands.md."""
    codes = " ".join(EXIT_CODES)
    return "\n".join([_INTRO, f"Exit codes: {codes}.", *_command(typer.main.get_command(app), "mbx")]) + "\n"


def _command(command: Any, path: str) -> Iterator[str]:
    """A command's section, then its commands'."""
    context = typer.Context(command, info_name=path)
    depth = min(path.count(" ") + 2, 4)
    about, examples = (command.help or "").strip(), _examples(command.epilog or "")
    yield from ("", f"{'#' * depth} {path}", "", _text(about), "")
    if not hasattr(command, "commands") or command.params:
        yield from ("~~~~text", command.get_usage(context).removeprefix("Usage: "), "~~~~", "")
        yield from _options(command, context)
    if examples:
        yield from ("~~~~sh", *examples, "~~~~")
    for name in command.list_commands(context) if hasattr(command, "commands") else ():
        yield from _command(command.commands[name], f"{path} {name}")


def _options(command: Any, context: typer.Context) -> Iterator[str]:
    """A table of what the command takes, as its own help words it."""
    rows = []
    for param in command.params:
        if set(param.opts) & set(_COMMON) or (said := param.get_help_record(context)) is None:
            continue
        rows.append(f"| `{said[0].replace('|', ', ')}` | {_text(said[1])} |")
    if rows:
        yield from ("| takes | meaning |", "| --- | --- |", *rows, "")


def _examples(epilog: str) -> list[str]:
    inside = epilog.partition("Examples:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in inside.splitlines() if line.strip()]


def _text(help_text: str) -> str:
    """Help as Markdown; flags and files as code, and no emphasis by chance."""
    return help_text.replace("\b\n", "").replace("*", r"\*").replace("<", "&lt;").replace("|", "&#124;")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
