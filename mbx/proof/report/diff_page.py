"""What changed between two checkpoints, as a page."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from mbx.page import bars, cell, document, items, prose, table, write
from mbx.proof.diff import Change, Diff
from mbx.proof.report.plots import figure
from mbx.text import plural

_SHOWN = 500
_SHOWN_BARS = 60


def write_diff(found: Diff, path: Path) -> None:
    """Write the page; StorageError where the file cannot be written."""
    write(path, diff_page(found))


def diff_page(found: Diff) -> str:
    """The whole document: settings, tensors of one side alone, and each change, the largest first."""
    title = "Nothing changed" if found.same else "What changed"
    counts = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changes)} changed"
    over_all = "not finite" if found.relative is None else figure(found.relative)
    return document(
        title,
        (
            f"<h1>{title}</h1>",
            f"<p>From <code>{escape(found.left)}</code> to <code>{escape(found.right)}</code><br>"
            f'<span class="soft">{counts}, {plural(found.unchanged, "tensor")} unchanged; '
            f"|Δ| / |A| over all: {over_all}</span></p>",
            *(f'<p class="open">{escape(gap)}</p>' for gap in found.gaps),
            _settings(found),
            _named("Removed", found.removed),
            _named("Added", found.added),
            _chart(found.changes),
            _changes(found.changes),
        ),
    )


def _settings(found: Diff) -> str:
    if not found.has_settings:
        return '<p class="open">Settings were not compared: the two state none under the same names.</p>'
    rows = [
        (cell(f"<code>{escape(key)}</code>"), cell(escape(repr(old))), cell(escape(repr(new))))
        for key, old, new in found.config
    ]
    return f"<h2>Settings</h2>{table(rows, ('key', 'A', 'B'))}" if rows else ""


def _named(title: str, names: tuple[str, ...]) -> str:
    shown = [f"`{name}`" for name in names[:_SHOWN]] + _rest(len(names))
    return f"<h2>{title}</h2>{items(shown)}" if names else ""


def _rest(count: int) -> list[str]:
    return [f"… and {count - _SHOWN} more; --json lists all"] if count > _SHOWN else []


def _chart(changes: tuple[Change, ...]) -> str:
    measured = [change for change in changes if change.relative is not None][:_SHOWN_BARS]
    most = max((change.relative or 0.0 for change in measured), default=0.0)
    if not most or math.isinf(most):
        return ""
    rows = [(change.name, (change.relative or 0.0) / most, figure(change.relative)) for change in measured]
    return f"<h2>Change relative to the tensor's norm</h2>{bars(rows)}"


def _changes(changes: tuple[Change, ...]) -> str:
    heads = ("tensor", "dtype", "shape", "values that differ", "max |Δ|", "relative")
    rows = [
        (
            cell(f"<code>{escape(change.name)}</code>"),
            cell(_both(*change.dtypes)),
            cell(_both(*(str(list(shape)) for shape in change.shapes))),
            cell("" if change.differing is None else f"{change.differing:,} of {change.compared:,}", "number"),
            cell("" if change.relative is None else figure(change.max_abs), "number"),
            cell("not finite" if change.relative is None else figure(change.relative), "number"),
        )
        for change in changes[:_SHOWN]
    ]
    more = "".join(f'<p class="soft">{prose(line)}</p>' for line in _rest(len(changes)))
    return f"<h2>Tensors</h2>{table(rows, heads, (3, 4, 5))}{more}" if rows else ""


def _both(left: str, right: str) -> str:
    return escape(left if left == right else f"{left} → {right}")
