"""A parity report as a document and as one screen of text."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from mbx.cli.output import folded, paint
from mbx.text import screen_width

if TYPE_CHECKING:
    from mbx.proof.parity import Difference, ParityReport

_SHOWN_FINDINGS = 10
_INDENT = 20
_COLOURS = {"passed": "green", "failed": "red", "not run": "yellow"}


def document(report: ParityReport, *, forward: bool) -> dict[str, Any]:
    """What `--json` prints. The forward leg stands in it also where nobody asked for it."""
    legs: dict[str, dict[str, Any]] = {
        leg.name: {"status": leg.status, "summary": leg.summary, "details": list(leg.details)} for leg in report.legs
    }
    for leg in report.legs:
        if leg.figures:
            legs[leg.name]["figures"] = {name: _finite(value) for name, value in leg.figures}
    if not forward:
        legs["forward"] = {"status": "not run", "summary": "not asked for; add --forward", "details": []}
    return {
        "passed": report.passed,
        "proved": report.proved,
        "left": report.left,
        "right": report.right,
        "table": report.table,
        "asked": [leg.name for leg in report.legs],
        "legs": legs,
        "first": _difference(report.first),
        "worst": _difference(report.worst),
        "differences": [_difference(found) for found in report.differences],
        "dtypes": [
            {"expected": row.expected, "found": row.found, "tensors": row.tensors, "bytes": row.nbytes}
            for row in report.dtypes
        ],
        "padding": list(report.padding),
        "waived": list(report.waived),
        "gaps": [{"kind": gap.kind, "what": gap.what, "open": gap in report.open_gaps} for gap in report.gaps],
        "compared_values": report.compared_values,
        "borders": [
            {"name": one.name, "max_abs": _finite(one.max_abs), "relative": _finite(one.relative)}
            for one in report.borders
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    largest = found.max_abs
    return {
        "name": found.name,
        "dtype": found.dtype,
        "shape": list(found.shape),
        "what": found.what,
        "elements": found.elements,
        "total": found.total,
        "first": None if found.first is None else list(found.first),
        "max_abs": None if largest is None or not math.isfinite(largest) else largest,
        "finite": largest is None or math.isfinite(largest),
        "cause": found.cause,
    }


def lines(doc: dict[str, Any]) -> list[str]:
    """One screen: each leg with its findings, the first and the worst tensor with their causes, the verdict."""
    out = []
    for name, leg in doc["legs"].items():
        status = leg["status"]
        summary = textwrap.wrap(leg["summary"], screen_width() - _INDENT, break_on_hyphens=False)
        head = "  " + name.ljust(9) + paint(status, _COLOURS[status]) + " " * (9 - len(status))
        out += [head + summary[0], *(" " * _INDENT + text for text in summary[1:])]
        found = leg["details"]
        out += [line for text in found[:_SHOWN_FINDINGS] for line in folded(text, "    ")]
        if (rest := len(found) - _SHOWN_FINDINGS) > 0:
            out.append(f"    … and {rest} more; --json lists all")
    mixed = [row for row in doc["dtypes"] if row["expected"] != row["found"]]
    for row in mixed:
        out += folded(f"dtypes: {row['tensors']} tensors are {row['found']}, {row['expected']} was expected", "  ")
    out += _causes(doc)
    for kind in dict.fromkeys(gap["kind"] for gap in doc["gaps"]):
        named = "; ".join(gap["what"] for gap in doc["gaps"] if gap["kind"] == kind)
        out += textwrap.wrap(f"{kind}: {named}", screen_width(), initial_indent="  ", subsequent_indent="    ")
    if doc["proved"]:
        return [*out, paint(f"parity holds in {', '.join(doc['asked'])}", "green")]
    left = [f"{name} {doc['legs'][name]['status']}" for name in doc["asked"]]
    left = [text for text in left if not text.endswith("passed")]
    left += dict.fromkeys(f"some of it is {gap['kind']}" for gap in doc["gaps"] if gap["open"])
    return [*out, *(paint(line, "red") for line in folded(f"parity is not proved: {', '.join(left)}"))]


def _causes(doc: dict[str, Any]) -> list[str]:
    first, worst = doc["first"], doc["worst"]
    if first is None:
        return []
    named = [("first", first)] + ([("worst", worst)] if worst["name"] != first["name"] else [])
    out = []
    for label, found in named:
        out += folded(f"{label}: `{found['name']}`: {found['what']}", "  ")
        largest = found["max_abs"] if found["finite"] else "not finite"
        if largest is not None:
            text = largest if isinstance(largest, str) else f"{largest:.3g}"
            out.append(f"    max |Δ| {text} over {found['elements']} of {found['total']} values")
        out += folded(f"likely cause: {found['cause'] or 'no known pattern'}", "    ")
    return out
