"""A budget as a page: what the memory goes to, whether a GPU has it, and what would change that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mbx.page import bars, cell, document, table

_GIB = 1 << 30


def budget_page(setting: str, found: Mapping[str, Any]) -> str:
    """The page of what `mbx budget --json` prints; `setting` is the recipe's in words."""
    largest = max(found["bytes"].values(), default=0) or 1
    parts = [(name, size / largest, f"{size / _GIB:.2f} GiB") for name, size in found["bytes"].items()]
    body = [
        f"<h1>{escape(found['recipe'])}</h1><p>{escape(setting)}</p>",
        _verdict(found),
        f"<h2>Peak of a rank: {found['total_bytes'] / _GIB:.2f} GiB</h2>{bars(parts, 160)}",
    ]
    if len(stages := found["stages_bytes"]) > 1:
        rows = [(f"stage {n}", size / max(stages), f"{size / _GIB:.2f} GiB") for n, size in enumerate(stages)]
        body.append(f"<h2>By stage</h2>{bars(rows, 160)}")
    body += [
        _options("What one change would do", found.get("variants", ()), found.get("device")),
        _options("Fastest settings that fit, by an estimate", found.get("fastest", ()), found.get("device")),
    ]
    return document(f"{found['recipe']}: memory", body)


def _verdict(found: Mapping[str, Any]) -> str:
    if "device" not in found:
        return ""
    device, kinds = found["device"], {"yes": "passed", "barely": "open", "no": "failed"}
    room = f"{found['needed_bytes'] / _GIB:.1f} of {device['memory_bytes'] / _GIB:.1f} GiB a GPU"
    shared = ", the processor's share of the same memory counted" if device["unified"] else ""
    said = f'<span class="{kinds[found["fits"]]}" id="verdict">{found["fits"]}</span>'
    return f"<p>Fits {found['gpus']} x {escape(device['name'])}: {said} ({room}{shared})</p>"


def _options(title: str, options: Sequence[Mapping[str, Any]], device: Mapping[str, Any] | None) -> str:
    if not options or device is None:
        return ""
    rows = [
        (
            cell(f"<code>{escape(' '.join(one['overrides']))}</code>"),
            cell(f"{one['needed_bytes'] / _GIB:.1f}", "number"),
            cell(one["fits"]),
            cell(f"{one['tokens_per_s_estimate']:,}" if one["tokens_per_s_estimate"] else "", "number"),
        )
        for one in options
    ]
    return f"<h2>{title}</h2>{table(rows, ('overrides', 'GiB', 'fits', 'tokens/s, an estimate'), (1, 3))}"
