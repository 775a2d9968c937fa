"""The report's plots: a bar a tensor, and how far the hidden states are apart behind each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from mbx.page import Dot, bars, curve
from mbx.proof.parity import Difference

if TYPE_CHECKING:
    from mbx.models.forward.divergence import BorderDiff

_SHOWN_BARS = 60


def divergence_plot(borders: Sequence[BorderDiff]) -> str:
    """Relative difference of the hidden states behind each layer, on a logarithmic scale; empty without borders."""
    if not borders:
        return ""
    from mbx.models.forward.divergence import first_divergence

    values = [border.relative for border in borders if 0 < border.relative < math.inf]
    low = math.floor(math.log10(min(values, default=1e-8)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1e-7))))
    first = first_divergence(borders)

    def height(value: float) -> float:
        return high if value == math.inf else low if value <= 0 else math.log10(value)

    line = [(float(number), height(border.relative)) for number, border in enumerate(borders)]
    dots = [
        Dot(x, y, "bad" if border is first or border.relative == math.inf else "bar", border.line, "border")
        for (x, y), border in zip(line, borders, strict=True)
    ]
    decades = {float(decade): f"1e{decade}" for decade in range(low, high + 1)}
    said = "" if first is None else f"<p>The first to diverge is {escape(first.line)}.</p>"
    drawn = curve(line, dots, decades, (borders[0].name, borders[-1].name))
    return f"<h2>Hidden states, relative difference behind each layer</h2>{said}{drawn}"


def tensor_plots(differences: Sequence[Difference]) -> str:
    """Two bar charts, a bar a tensor in the order of the model: share of values that differ, and the largest."""
    measured = [d for d in differences if d.elements is not None and d.total]
    if not measured:
        return ""
    shown = measured[:_SHOWN_BARS]
    note = "" if len(shown) == len(measured) else f'<p class="soft">the first {len(shown)} of {len(measured)}</p>'
    shares = [(d.name, share := (d.elements or 0) / (d.total or 1), f"{share:.2%}") for d in shown]
    sizes = [(d.name, _magnitude(d.max_abs), figure(d.max_abs)) for d in shown]
    return (
        f"<h2>Differing tensors</h2>{note}<h3>Share of values that differ</h3>{bars(shares)}"
        f"<h3>Largest difference, on a logarithmic scale</h3>{bars(sizes)}"
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
