"""A parity report as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from converters.errors import in_python, spelt
from mbx import page as pages
from mbx.page import cell, items, prose, table
from mbx.proof.parity import Difference, Leg, ParityReport
from mbx.proof.report.plots import divergence_plot, figure, tensor_plots
from mbx.text import plural
from mbx.version import __version__

_SHOWN = 500
_CLASSES = {"passed": "passed", "failed": "failed", "not run": "open"}


def write(report: ParityReport, path: Path, spelling: Callable[[str], str] = in_python) -> None:
    """Write the report of a comparison, choices named by `spelling`; StorageError where the file cannot be written."""
    pages.write(path, spelt(page(report), spelling))


def page(report: ParityReport) -> str:
    """The whole document."""
    verdict = "passed" if report.passed else "failed"
    title = "Parity holds" if report.passed else "Parity is not proved"
    return pages.document(
        title,
        (
            f'<h1>{title} <span class="{verdict}" id="verdict">{verdict}</span></h1>',
            f"<p><code>{escape(report.left)}</code> against <code>{escape(report.right)}</code>"
            f'<br><span class="soft">table {escape(report.table) or "none"}, {report.compared_values:,} values '
            f"compared, mbx {escape(__version__)}</span></p>",
            _titled("Legs", table(_leg(leg) for leg in report.legs)),
            _listed("First and worst", _named(report)),
            divergence_plot(report.borders),
            tensor_plots(report.differences),
            _tensors(report.differences) if report.differences else "",
            _dtypes(report) if report.dtypes else "",
            _listed("Padding", report.padding),
            _listed("Tensors that one side may lack", [f"`{name}`" for name in report.waived]),
        ),
    )


def _titled(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}"


def _listed(title: str, lines: Iterable[str]) -> str:
    found = list(lines)
    return _titled(title, items(found)) if found else ""


def _leg(leg: Leg) -> tuple[str, str, str]:
    rest = len(leg.details) - _SHOWN
    details = items([*leg.details[:_SHOWN], *([f"… and {rest} more"] if rest > 0 else [])])
    found = plural(len(leg.details), "line")
    more = f"<details><summary>{found}</summary>{details}</details>" if leg.details else ""
    return cell(leg.name), cell(leg.status, _CLASSES[leg.status]), cell(prose(leg.summary) + more)


def _named(report: ParityReport) -> Iterator[str]:
    if report.first is not None and report.worst is not None:
        yield f"First: {report.first.line}"
        if report.worst.name != report.first.name:
            yield f"Worst: {report.worst.line}"


def _tensors(differences: Sequence[Difference]) -> str:
    heads = ("tensor", "dtype", "shape", "values that differ", "max |Δ|", "first", "likely cause")
    rows = [
        (
            cell(f"<code>{escape(found.name)}</code>"),
            cell(escape(found.dtype)),
            cell(str(list(found.shape))),
            cell(escape(found.what if found.elements is None else f"{found.elements:,} of {found.total:,}"), "number"),
            cell(figure(found.max_abs), "number"),
            cell("" if found.first is None else str(list(found.first))),
            cell(prose(found.cause or "no known pattern")),
        )
        for found in differences[:_SHOWN]
    ]
    rest = len(differences) - _SHOWN
    more = f'<p class="soft">… and {rest} more; --json lists all</p>' if rest > 0 else ""
    return _titled("Tensors", table(rows, heads, kind="tensor") + more)


def _dtypes(report: ParityReport) -> str:
    rows = [
        (
            cell(escape(row.expected)),
            cell(escape(row.found), "passed" if row.expected == row.found else "failed"),
            cell(f"{row.tensors:,}", "number"),
            cell(f"{row.nbytes:,}", "number"),
        )
        for row in report.dtypes
    ]
    return _titled("Dtypes", table(rows, ("expected", "found", "tensors", "bytes"), numbers=(2, 3)))
