"""Writes the measured block `bridge`: `python -m benchmarks.bridge_figures docs/formats.md`.

Source: fixtures/measured/bridge_exports.json, which `--record FILE --tool "Megatron-Bridge 0.6.2"` takes from what
`MBX_BRIDGE=COMMAND pytest tests/tables/test_bridge_exports_ours.py --junitxml FILE` left, and likewise of mcore-bridge
and `tests/tables/test_mcore_bridge_exports_ours.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.figures import MEASURED, table

RECORDED = MEASURED / "bridge_exports.json"
_BLOCK = re.compile(r"(?P<begin><!-- begin: bridge [^\n]*-->)\n.*?(?P<end><!-- end: bridge -->)", re.S)
_CASE = re.compile(r"(?P<test>\w+)\[(?P<model>\w+)\]")
#: What each test asks, in words, by tool.
ASKED = {
    "Megatron-Bridge": {
        "test_nothing_is_lost": "text models",
        "test_nothing_of_a_model_with_code_of_its_own_is_lost": "text models whose folders come with code",
        "test_nothing_of_a_model_with_towers_is_lost": "with towers",
        "test_towers_come_from_the_checkpoint": "the same, cut for TP 2 and PP 2, beside a folder with other values",
        "test_prediction_layers_beside_towers_are_not_lost": "prediction layers beside towers",
    },
    "mcore-bridge": {
        "test_nothing_of_its_flavour_is_lost": "text models",
        "test_nothing_of_its_flavour_is_lost_with_towers": "with towers",
    },
}


def record(report: Path, tool: str) -> None:
    """Keep which models passed which test of a tool (name and release), and how many tensors were compared.

    ValueError where one did not pass.
    """
    asked = ASKED[tool.partition(" ")[0]]
    cases: dict[str, dict[str, int]] = {}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    for case in suite.iter("testcase"):
        found = _CASE.fullmatch(str(case.get("name")))
        if found is None or found["test"] not in asked:
            continue
        if any(case.find(sign) is not None for sign in ("failure", "error", "skipped")):
            raise ValueError(f"{case.get('name')} did not pass")
        counted = case.find("properties/property[@name='tensors']")
        assert counted is not None
        cases.setdefault(found["test"], {})[found["model"]] = int(str(counted.get("value")))
    run = {"tool": tool, "date": str(suite.get("timestamp"))[:10], "cases": cases}
    others = [other for other in recorded() if other["tool"].partition(" ")[0] != tool.partition(" ")[0]]
    runs = sorted([*others, run], key=lambda one: list(ASKED).index(one["tool"].partition(" ")[0]))
    RECORDED.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def recorded() -> list[dict[str, Any]]:
    """The last run of each tool."""
    found: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def exports(run: dict[str, Any]) -> list[str]:
    """What a tool exported of our checkpoints, a line a test."""
    body = [
        (words, len(models), sum(models.values()), ", ".join(models))
        for test, words in ASKED[run["tool"].partition(" ")[0]].items()
        if (models := run["cases"].get(test))
    ]
    lines = [f"{run['tool']} on a CPU, {run['date']}: tiny models that it loaded and exported without loss.", ""]
    return lines + table(("what", "models", "tensors", "which"), body)


def written(text: str) -> str:
    """A page with its block made anew."""
    body = "\n".join(line for run in recorded() for line in exports(run)).strip("\n")
    return _BLOCK.sub(lambda found: f"{found['begin']}\n\n{body}\n\n{found['end']}", text)


def main() -> None:
    """Record a run, write the pages that are named, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--record", type=Path, metavar="FILE", help="what pytest --junitxml wrote")
    parser.add_argument("--tool", default="", help="name and release")
    arguments = parser.parse_args()
    if arguments.record is not None:
        record(arguments.record, arguments.tool)
    for page in arguments.pages:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
