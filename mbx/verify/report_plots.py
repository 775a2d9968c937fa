"""The report's plots as SVG in the page: a bar a tensor, and how far the hidden states are apart behind each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from mbx.verify.parity import Difference

if TYPE_CHECKING:
    from mbx.models.forward.divergence import BorderDiff

_WIDTH, _ROW = 640, 18
_SHOWN_BARS = 60
_LEFT, _TOP, _HEIGHT = 52, 8, 180


def divergence_plot(borders: Sequence[BorderDiff]) -> str:
    """Relative difference of the hidden states behind each layer, on a logarithmic scale; empty without borders."""
    if not borders:
        return ""
    from mbx.models.forward.divergence import first_divergence

    values = [border.relative for border in borders if 0 < border.relative < math.inf]
    low = math.floor(math.log10(min(values, default=1e-8)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1e-7))))
    step = (_WIDTH - _LEFT - 16) / max(1, len(borders) - 1)
    first = first_divergence(borders)

    def place(number: int, value: float) -> tuple[float, float]:
        share = 1.0 if value == math.inf else 0.0 if value <= 0 else (math.log10(value) - low) / (high - low)
        return _LEFT + number * step, _TOP + _HEIGHT * (1 - min(1.0, max(0.0, share)))

    out = []
    for decade in range(low, high + 1):
        y = _TOP + _HEIGHT * (1 - (decade - low) / (high - low))
        out.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 8}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{decade}</text>')
    points = [place(number, border.relative) for number, border in enumerate(borders)]
    out.append(f'<polyline class="path" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    for (x, y), border in zip(points, borders, strict=True):
        kind = "bad" if border is first or border.relative == math.inf else "bar"
        out.append(
            f'<g class="border"><title>{escape(border.line)}</title>'
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    ends = [(points[0][0], "start", borders[0].name), (points[-1][0], "end", borders[-1].name)]
    out += [f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="{a}">{escape(t)}</text>' for x, a, t in ends]
    picture = f'<svg viewBox="0 0 {_WIDTH} {_TOP + _HEIGHT + 28}" width="100%" role="img">{"".join(out)}</svg>'
    said = "" if first is None else f"<p>The first to diverge is {escape(first.line)}.</p>"
    return f"<h2>Hidden states, relative difference behind each layer</h2>{said}{picture}"


def tensor_plots(differences: Sequence[Difference]) -> str:
    """Two bar charts, a bar a tensor in the order of the model: share of values that differ, and the largest."""
    measured = [d for d in differences if d.elements is not None and d.total]
    if not measured:
        return ""
    shown = measured[:_SHOWN_BARS]
    note = "" if len(shown) == len(measured) else f'<p class="soft">the first {len(shown)} of {len(measured)}</p>'
    shares = [(d.name, (d.elements or 0) / (d.total or 1), f"{(d.elements or 0) / (d.total or 1):.2%}") for d in shown]
    sizes = [(d.name, _magnitude(d.max_abs), figure(d.max_abs)) for d in shown]
    return (
        f"<h2>Differing tensors</h2>{note}<h3>Share of values that differ</h3>{_bars(shares)}"
        f"<h3>Largest difference, on a logarithmic scale</h3>{_bars(sizes)}"
    )


def figure(value: float | None) -> str:
    """A difference in three digits; empty where there is none."""
    if value is None:
        return ""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _magnitude(value: float | None) -> float:
    """Length of a bar from 0 to 1: decades from 1e-8 to 1e4; what is not finite is full."""
    if not value:
        return 0.0
    return 1.0 if math.isinf(value) else min(1.0, max(0.02, (math.log10(value) + 8) / 12))


def _bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars as SVG; lengths are from 0 to 1."""
    height, out = len(rows) * _ROW + 4, []
    for number, (name, length, text) in enumerate(rows):
        y = number * _ROW
        width = max(1, round(length * (_WIDTH // 2 - 90)))
        short = name if len(name) <= 52 else f"…{name[-51:]}"
        kind = "bad" if text == "not finite" else "bar"
        out.append(
            f'<g><title>{escape(name)}: {escape(text)}</title><text x="{_WIDTH // 2 - 6}" y="{y + 13}" '
            f'text-anchor="end">{escape(short)}</text><rect class="{kind}" x="{_WIDTH // 2}" y="{y + 3}" '
            f'width="{width}" height="{_ROW - 6}"/><text x="{_WIDTH // 2 + width + 4}" y="{y + 13}">'
            f"{escape(text)}</text></g>"
        )
    axis = f'<line x1="{_WIDTH // 2}" y1="0" x2="{_WIDTH // 2}" y2="{height}"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img">{axis}{"".join(out)}</svg>'
