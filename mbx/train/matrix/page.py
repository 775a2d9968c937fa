"""A matrix as one HTML page: a table of its cells, bars of speed and memory, memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mbx.page import bars, cell, curve, document, items, prose, table

_HEADS = ("run", "tokens/s", "of the recipe", "peak GiB", "predicted", "error", "first step s", "step s", "loss", "")


def matrix_page(title: str, setting: str, records: Sequence[dict[str, Any]]) -> str:
    """The page; `setting` is the recipe's in words."""
    ok = [record for record in records if record["status"] == "ok"]
    parts = [f"<h1>{escape(title)}</h1><p>{prose(setting)}</p>", _table(records)]
    parts += [
        _bars("Tokens a second", ok, "tokens_per_s", "{:,.0f}"),
        _bars("Peak memory, GiB", ok, "peak_gib", "{:.2f}"),
    ]
    for record in records:
        if record["status"] != "ok":
            parts.append(
                f"<h2>{escape(record['cell']['name'])}: {escape(record['status'])}</h2>{items(record['said'])}"
            )
    parts.append("<h1>Memory over time</h1>")
    parts += [_over_time(record) for record in records]
    return document(title, parts)


def _table(records: Sequence[dict[str, Any]]) -> str:
    base = next((r["tokens_per_s"] for r in records if r["cell"]["name"] == "recipe" and r["status"] == "ok"), None)
    rows = []
    for record in records:
        name = cell(f"<code>{escape(record['cell']['name'])}</code>")
        if record["status"] != "ok":
            rows.append([name, *[cell("") for _ in _HEADS[2:]], cell(escape(record["status"]), "failed")])
            continue
        predicted, peak = record["predicted_gib"], record["peak_gib"]
        figures = (
            f"{record['tokens_per_s']:,.0f}",
            f"{record['tokens_per_s'] / base:.2f}" if base else "",
            f"{peak:.2f}",
            f"{predicted:.2f}" if predicted else "",
            f"{predicted / peak - 1:+.1%}" if predicted else "",
            f"{record['first_step_s']:.2f}",
            f"{record['step_s']:.3f}",
            f"{record['losses'][0]:.4f} → {record['losses'][-1]:.4f}",
        )
        rows.append([name, *[cell(figure, "number") for figure in figures], cell("ok", "passed")])
    return table(rows, _HEADS, range(1, 9))


def _bars(title: str, records: Sequence[dict[str, Any]], key: str, form: str) -> str:
    if not records:
        return ""
    most = max(record[key] for record in records) or 1.0
    rows = [(record["cell"]["name"], record[key] / most, form.format(record[key])) for record in records]
    return f"<h2>{escape(title)}</h2>{bars(rows, 160)}"


def _over_time(record: dict[str, Any]) -> str:
    samples = record.get("memory_over_time") or []
    if len(samples) < 2:
        return ""
    every = max(1, len(samples) // 400)
    line = [(float(x), float(y)) for x, y in samples[::every]]
    high = max(y for _, y in line) or 1.0
    drawn = curve(line, (), {0.0: "0", high: f"{high:.2f} GiB"}, ("0 s", f"{line[-1][0]:.1f} s"))
    return f"<h2>{escape(record['cell']['name'])}</h2>{drawn}"
