"""Reports as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from converters.errors import StorageError

WIDTH = 640
_LEFT, _TOP, _HEIGHT = 60, 8, 180
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd; --paper: #fff;
  --passed: #1a7f37; --failed: #c62828; --open: #9a6700; --bar: #3b6fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #9a9a9a; --line: #3a3a3a; --paper: #161616;
  --passed: #4ac26b; --failed: #ff7b72; --open: #d4a72c; --bar: #7aa7e0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; } .wide svg { min-width: 34rem; }
td > code:only-child { white-space: nowrap; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: var(--passed); } .failed { color: var(--failed); } .open { color: var(--open); }
.soft { color: var(--soft); } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .bar { fill: var(--bar); } svg .bad { fill: var(--failed); } svg line { stroke: var(--line); }
svg .path { fill: none; stroke: var(--bar); stroke-width: 1.5; } svg .second { fill: var(--open); }
:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; } summary { cursor: pointer; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff;
  --passed: #1a7f37; --failed: #c62828; --open: #9a6700; --bar: #3b6fb5; }
  body { margin: 0; max-width: none; font-size: 11px; } .wide { overflow: visible; } .wide svg { min-width: 0; }
  td > code:only-child { white-space: normal; }
  tr, svg, h2 { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def write(path: Path, text: str) -> None:
    """Write a report; StorageError where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write `{path}`: {error.strerror or error}") from error


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page of the parts that are not empty; `title` is text."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def prose(text: str) -> str:
    """Escaped text, with what stands in backquotes set as code."""
    pieces = escape(text).split("`")
    if len(pieces) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))


def items(lines: Iterable[str]) -> str:
    """A list of lines of text."""
    return f"<ul>{''.join(f'<li>{prose(line)}</li>' for line in lines)}</ul>"


def cell(content: str, kind: str = "") -> str:
    """A table's cell; `content` is HTML."""
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def table(
    rows: Iterable[Iterable[str]], heads: Sequence[str] = (), numbers: Sequence[int] = (), kind: str = ""
) -> str:
    """A table of rows of cells under `heads`, of which those in `numbers` are set flush right."""
    head = "".join(
        f'<th scope="col" class="number">{h}</th>' if n in numbers else f'<th scope="col">{h}</th>'
        for n, h in enumerate(heads)
    )
    opened = f'<tr class="{kind}">' if kind else "<tr>"
    body = "".join(f"{opened}{''.join(row)}</tr>" for row in rows)
    first = f"<tr>{head}</tr>" if heads else ""
    return _wide(f"<table>{first}{body}</table>", "table")


def _wide(content: str, label: str) -> str:
    """What may be wider than the screen, and is then scrolled for itself, by keyboard too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def picture(height: float, *parts: str) -> str:
    """An SVG as wide as the page."""
    drawn = f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img">{"".join(parts)}</svg>'
    return _wide(drawn, "picture")


def bars(rows: Sequence[tuple[str, float, str]], names: int = WIDTH // 2) -> str:
    """Horizontal bars of (name, length from 0 to 1, figure); the names take that width, and long ones lose their
    beginning. A bar whose figure is `not finite` is a bad one."""
    row, letters = 18, names * 52 // 320
    height, out = len(rows) * row + 4, []
    for number, (name, length, text) in enumerate(rows):
        y, width = number * row, max(1, round(length * (WIDTH - names - 90)))
        short = name if len(name) <= letters else f"…{name[-letters + 1 :]}"
        kind = "bad" if text == "not finite" else "bar"
        out.append(
            f'<g><title>{escape(name)}: {escape(text)}</title><text x="{names - 6}" y="{y + 13}" '
            f'text-anchor="end">{escape(short)}</text><rect class="{kind}" x="{names}" y="{y + 3}" width="{width}" '
            f'height="{row - 6}"/><text x="{names + width + 4}" y="{y + 13}">{escape(text)}</text></g>'
        )
    return picture(height, f'<line x1="{names}" y1="0" x2="{names}" y2="{height}"/>', *out)


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a curve that is drawn apart: its colour by `kind`, what a pointer shows, and what group it is of."""

    x: float
    y: float
    kind: str
    title: str
    group: str


def curve(
    line: Sequence[tuple[float, float]], dots: Iterable[Dot], heights: Mapping[float, str], ends: tuple[str, str]
) -> str:
    """A line over x, with a ruled and labelled line at each of `heights`, from the lowest to the highest of which it
    is drawn, and words under both ends; `heights` names two at least."""
    low_x, high_x, low, high = line[0][0], line[-1][0], min(heights), max(heights)
    bottom, right = _TOP + _HEIGHT, WIDTH - 16

    def across(x: float) -> float:
        return _LEFT + (x - low_x) / ((high_x - low_x) or 1) * (right - _LEFT)

    def down(y: float) -> float:
        return bottom - min(1.0, max(0.0, (y - low) / ((high - low) or 1))) * _HEIGHT

    out = []
    for height, text in heights.items():
        y = down(height)
        out.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - 8}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
    out.append(f'<polyline class="path" points="{points}"/>')
    for dot in dots:
        circle = f'<circle class="{dot.kind}" cx="{across(dot.x):.1f}" cy="{down(dot.y):.1f}" r="4"/>'
        out.append(f'<g class="{dot.group}"><title>{escape(dot.title)}</title>{circle}</g>')
    for x, anchor, text in ((_LEFT, "start", ends[0]), (right, "end", ends[1])):
        out.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="{anchor}">{escape(text)}</text>')
    return picture(bottom + 28, *out)
