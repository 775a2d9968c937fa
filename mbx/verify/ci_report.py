"""What `mbx verify ci` leaves behind: JUnit XML for the service that runs it, Markdown for the people who read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from mbx.text import plural
from mbx.verify.ci import Result

#: Characters that XML 1.0 (section 2.2) cannot hold, escaped or not.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKS = {"passed": "✓", "failed": "✗ failed", "not run": "– not run"}
_SHOWN_DETAILS = 20
_SHOWN_LINES = 5


def entry(result: Result) -> dict[str, object]:
    """One result as `json` prints it."""
    leg = result.leg
    return {
        "check": result.check,
        "layout": result.layout,
        "leg": leg.name,
        "status": leg.status,
        "summary": leg.summary,
        "details": list(leg.details),
        "seconds": round(result.seconds, 3),
    }


def lines(results: Sequence[Result]) -> list[str]:
    """One line a check and layout, with every leg that did not pass below it."""
    out = []
    for check, layout in dict.fromkeys((result.check, result.layout) for result in results):
        cells = [result for result in results if (result.check, result.layout) == (check, layout)]
        marks = ", ".join(f"{cell.leg.name} {cell.leg.status}" for cell in cells)
        out.append(f"{check} at {layout}: {marks}")
        out += [f"  {cell.leg.name}: {cell.leg.summary}" for cell in cells if not cell.passed]
        out += [f"    {line}" for cell in cells if not cell.passed for line in cell.leg.details[:_SHOWN_LINES]]
    open_cells = sum(not result.passed for result in results)
    verdict = "all passed" if not open_cells else f"{open_cells} did not pass"
    return [*out, f"{plural(len(results), 'leg')}: {verdict}"]


def junit(results: Sequence[Result]) -> str:
    """JUnit XML: a suite a check, a case a layout and leg. A leg that did not run is an error, not a skipped test."""
    suites = []
    for check in dict.fromkeys(result.check for result in results):
        cases = [result for result in results if result.check == check]
        failures = sum(result.leg.status == "failed" for result in cases)
        errors = sum(result.leg.status == "not run" for result in cases)
        seconds = sum(result.seconds for result in cases)
        suites.append(
            f'  <testsuite name={quoteattr(check)} tests="{len(cases)}" failures="{failures}" errors="{errors}" '
            f'skipped="0" time="{seconds:.3f}">'
        )
        suites += [_case(result) for result in cases]
        suites.append("  </testsuite>")
    text = "\n".join(['<?xml version="1.0" encoding="utf-8"?>', "<testsuites>", *suites, "</testsuites>", ""])
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _case(result: Result) -> str:
    head = (
        f"    <testcase classname={quoteattr(result.check)} name={quoteattr(f'{result.layout} {result.leg.name}')} "
        f'time="{result.seconds:.3f}"'
    )
    if result.passed:
        return f"{head}><system-out>{escape(result.leg.summary)}</system-out></testcase>"
    kind = "failure" if result.leg.status == "failed" else "error"
    text = "\n".join((result.leg.summary, *result.leg.details))
    return f"{head}><{kind} message={quoteattr(result.leg.summary)}>{escape(text)}</{kind}></testcase>"


def markdown(results: Sequence[Result]) -> str:
    """A table with a row a check and layout and a column a leg, and every finding below it."""
    legs = list(dict.fromkeys(result.leg.name for result in results))
    rows = dict.fromkeys((result.check, result.layout) for result in results)
    by_cell = {(result.check, result.layout, result.leg.name): result for result in results}
    passed = sum(result.passed for result in results)
    verdict = "all passed" if passed == len(results) else f"{len(results) - passed} of {len(results)} did not pass"
    lines = [f"## Conversion checks: {verdict}", "", f"| check | layout | {' | '.join(legs)} |"]
    lines.append("|---|---|" + "---|" * len(legs))
    for check, layout in rows:
        cells = [by_cell.get((check, layout, leg)) for leg in legs]
        marks = [" " if cell is None else _MARKS[cell.leg.status] for cell in cells]
        lines.append(f"| {_cell(check)} | {_cell(layout)} | {' | '.join(marks)} |")
    for result in results:
        if not result.passed:
            lines += ["", f"**{result.check}, {result.layout}, {result.leg.name}**: {result.leg.summary}"]
            lines += [f"- {line}" for line in result.leg.details[:_SHOWN_DETAILS]]
            if (rest := len(result.leg.details) - _SHOWN_DETAILS) > 0:
                lines.append(f"- … and {rest} more")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
