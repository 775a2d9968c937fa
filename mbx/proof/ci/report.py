"""What `mbx verify ci` leaves behind: JUnit XML for the service that runs it, Markdown for the people who read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from mbx.proof.ci.matrix import Result
from mbx.text import in_markdown, plural

#: Characters that XML 1.0 (section 2.2) cannot hold, escaped or not.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKS = {"passed": "✓", "failed": "✗ failed", "not run": "– not run"}
_KINDS = {"passed": "system-out", "failed": "failure", "not run": "error"}
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
    root = Element("testsuites")
    for check in dict.fromkeys(result.check for result in results):
        cases = [result for result in results if result.check == check]
        kinds = [_KINDS[result.leg.status] for result in cases]
        counts = {
            "tests": len(cases),
            "failures": kinds.count("failure"),
            "errors": kinds.count("error"),
            "skipped": 0,
        }
        time = f"{sum(result.seconds for result in cases):.3f}"
        suite = SubElement(root, "testsuite", {"name": check, **{k: str(n) for k, n in counts.items()}, "time": time})
        for result, kind in zip(cases, kinds, strict=True):
            leg, name = result.leg, f"{result.layout} {result.leg.name}"
            case = SubElement(suite, "testcase", classname=check, name=name, time=f"{result.seconds:.3f}")
            said = SubElement(case, kind, {} if result.passed else {"message": leg.summary})
            said.text = "\n".join((leg.summary, *(() if result.passed else leg.details)))
    indent(root)
    text = f'<?xml version="1.0" encoding="utf-8"?>\n{tostring(root, encoding="unicode")}\n'
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


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
        lines.append(f"| {in_markdown(check)} | {in_markdown(layout)} | {' | '.join(marks)} |")
    for result in results:
        if not result.passed:
            named = f"**{in_markdown(result.check)}, {in_markdown(result.layout)}, {result.leg.name}**"
            lines += ["", f"{named}: {in_markdown(result.leg.summary)}"]
            lines += [f"- {in_markdown(line)}" for line in result.leg.details[:_SHOWN_DETAILS]]
            if (rest := len(result.leg.details) - _SHOWN_DETAILS) > 0:
                lines.append(f"- … and {rest} more")
    return "\n".join(lines) + "\n"
