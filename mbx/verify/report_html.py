"""A parity report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from converters.errors import StorageError, in_python, spelt
from mbx.text import plural
from mbx.verify.parity import Difference, Leg, ParityReport
from mbx.verify.report_plots import divergence_plot, figure, tensor_plots
from mbx.version import __version__

_SHOWN = 500
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd; --paper: #fff;
  --passed: #1a7f37; --failed: #c62828; --open: #9a6700; --bar: #3b6fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #9a9a9a; --line: #3a3a3a; --paper: #161616;
  --passed: #4ac26b; --failed: #ff7b72; --open: #d4a72c; --bar: #7aa7e0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: var(--passed); } .failed { color: var(--failed); } .open { color: var(--open); }
.soft { color: var(--soft); } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .bar { fill: var(--bar); } svg .bad { fill: var(--failed); } svg line { stroke: var(--line); }
svg .path { fill: none; stroke: var(--bar); stroke-width: 1.5; }
"""
_CLASSES = {"passed": "passed", "failed": "failed", "not run": "open"}


def write(report: ParityReport, path: Path, spelling: Callable[[str], str] = in_python) -> None:
    """Write the report of a comparison, choices named by `spelling`; StorageError where the file cannot be written."""
    try:
        path.write_text(spelt(page(report), spelling), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write `{path}`: {error.strerror or error}") from error


def page(report: ParityReport) -> str:
    """The whole document."""
    verdict = "passed" if report.passed else "failed"
    title = "Parity holds" if report.passed else "Parity is not proved"
    parts = [
        f'<h1>{title} <span class="{verdict}" id="verdict">{verdict}</span></h1>',
        f"<p><code>{escape(report.left)}</code> against <code>{escape(report.right)}</code>"
        f'<br><span class="soft">table {escape(report.table) or "none"}, {report.compared_values:,} values compared, '
        f"mbx {escape(__version__)}</span></p>",
        _legs(report.legs),
        _named(report),
        divergence_plot(report.borders),
        tensor_plots(report.differences),
        _tensors(report.differences),
        _dtypes(report),
        _listed("Padding", report.padding),
        _listed("Tensors that one side may lack", [f"`{name}`" for name in report.waived]),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{title}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _legs(legs: Sequence[Leg]) -> str:
    rows = []
    for leg in legs:
        details = "".join(f"<li>{_prose(line)}</li>" for line in leg.details[:_SHOWN])
        if (rest := len(leg.details) - _SHOWN) > 0:
            details += f"<li>… and {rest} more</li>"
        found = plural(len(leg.details), "line")
        more = f"<details><summary>{found}</summary><ul>{details}</ul></details>" if details else ""
        status = f'<td class="{_CLASSES[leg.status]}">{leg.status}</td>'
        rows.append(f'<tr id="leg-{leg.name}"><td>{leg.name}</td>{status}<td>{_prose(leg.summary)}{more}</td></tr>')
    return f'<h2>Legs</h2><div class="wide"><table>{"".join(rows)}</table></div>'


def _named(report: ParityReport) -> str:
    if report.first is None or report.worst is None:
        return ""
    items = [f"<li><b>First</b>: {_prose(report.first.line)}</li>"]
    if report.worst.name != report.first.name:
        items.append(f"<li><b>Worst</b>: {_prose(report.worst.line)}</li>")
    return f"<h2>First and worst</h2><ul>{''.join(items)}</ul>"


def _tensors(differences: Sequence[Difference]) -> str:
    if not differences:
        return ""
    heads = ("tensor", "dtype", "shape", "values that differ", "max |Δ|", "first", "likely cause")
    head = "".join(f"<th>{text}</th>" for text in heads)
    rows = []
    for found in differences[:_SHOWN]:
        counted = found.what if found.elements is None else f"{found.elements:,} of {found.total:,}"
        cells = [
            f"<td><code>{escape(found.name)}</code></td>",
            f"<td>{escape(found.dtype)}</td>",
            f"<td>{list(found.shape)}</td>",
            f'<td class="number">{escape(counted)}</td>',
            f'<td class="number">{figure(found.max_abs)}</td>',
            f"<td>{'' if found.first is None else list(found.first)}</td>",
            f"<td>{_prose(found.cause or 'no known pattern')}</td>",
        ]
        rows.append(f'<tr class="tensor">{"".join(cells)}</tr>')
    rest = len(differences) - _SHOWN
    more = f'<p class="soft">… and {rest} more; --json lists all</p>' if rest > 0 else ""
    return f'<h2>Tensors</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{more}'


def _dtypes(report: ParityReport) -> str:
    if not report.dtypes:
        return ""
    rows = "".join(
        f'<tr><td>{escape(row.expected)}</td><td class="{"passed" if row.expected == row.found else "failed"}">'
        f'{escape(row.found)}</td><td class="number">{row.tensors:,}</td><td class="number">{row.nbytes:,}</td></tr>'
        for row in report.dtypes
    )
    head = '<tr><th>expected</th><th>found</th><th class="number">tensors</th><th class="number">bytes</th></tr>'
    return f"<h2>Dtypes</h2><table>{head}{rows}</table>"


def _listed(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_prose(line)}</li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _prose(text: str) -> str:
    """Escaped text, with what stands in backquotes set as code."""
    pieces = escape(text).split("`")
    if len(pieces) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
