"""`mbx report`: show a report in a browser, here or from another machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from converters.errors import StorageError, UsageError
from mbx.cli import completions
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out

EPILOG = epilog(
    "mbx report report.html", "mbx report runs/llama32_1b_lora", "mbx report runs/llama32_1b_lora --serve --port 8000"
)


@grouped
def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help="A report, the folder of a run, or that of a matrix.",
            autocompletion=completions.runs,
        ),
    ],
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it to this machine alone until Ctrl-C: for an SSH tunnel.")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Where it is served; 0: any free one.")
    ] = 0,
    *,
    output: Output,
) -> None:
    """Open a report in the browser, or serve it.

    A run's is drawn anew from what it has logged so far. Without a desktop, and with --json, its path is all that is
    printed.
    """
    output.configure()
    path = _page_of(source).resolve()
    if serve:
        from mbx.cli.serving import serve_page

        serve_page(path, port)
        return
    opened = not out.json and _has_desktop() and _open(path)
    out.result({"report": str(path), "opened": opened}, lambda: [str(path)])
    if not opened:
        out.message("no browser was opened here; ‹serve› shows it to one through an SSH tunnel")


def _page_of(source: Path) -> Path:
    """The HTML file that is meant; a run's is written first."""
    from mbx.train.run.log import METRICS

    if (source / METRICS).is_file():
        from mbx.train.run.report import write_report

        return write_report(source)
    if (found := source / "matrix.html").is_file():
        return found
    if source.is_dir():
        raise UsageError(
            f"`{source}` is the folder of no run and no matrix",
            hint="`mbx verify parity A B --html FILE` writes a report",
        )
    if not source.is_file():
        raise StorageError(f"`{source}` does not exist")
    if source.suffix not in (".html", ".htm"):
        raise UsageError(f"`{source}` is no HTML file", hint="name a report, or the folder of a run or a matrix")
    return source


def _has_desktop() -> bool:
    """Whether a browser has a screen to open on; elsewhere webbrowser would take over the terminal with a text one."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(path: Path) -> bool:
    import webbrowser

    return webbrowser.open(path.as_uri())
