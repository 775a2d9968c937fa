"""What docs/performance.md says of the speed that mbx promises, from fixtures/measured/speed.json (`make bench`)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.speed import FIGURES, met, ratio

MEASURED = Path(__file__).resolve().parents[1] / "fixtures" / "measured" / "speed.json"
_STAGES = ("read", "cast", "checksum", "write")


def _row(cells: tuple[object, ...]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _wall(samples: list[dict[str, float]]) -> str:
    return f"{statistics.median(sample['seconds'] for sample in samples):.2f} s"


def _figures(name: str, part: dict[str, Any]) -> list[str]:
    steps = part["steps"]
    rounds = len(steps["cp"])
    lines = [f"{name}, Llama {part['size']} shape, {part['bytes'] / 1e9:.2f} GB of bf16, {rounds} rounds:", ""]
    lines += [_row(("figure", "wall", "beside", "ratio", "target", "")), "|" + " --- |" * 6]
    for figure, (step, base, speed, targets) in FIGURES.items():
        if not steps.get(step):
            continue
        found = ratio(figure, steps)
        sign, verdict = "≥" if speed else "≤", {True: "met", False: "missed", None: ""}[met(figure, name, found)]
        target = f"{sign} {targets[name]}" if name in targets else "–"
        beside = f"{'`cp -r`' if base == 'cp' else '`cat`'}, {_wall(steps[base])}"
        lines.append(_row((figure, _wall(steps[step]), beside, f"{found:.2f}", target, verdict)))
    return [*lines, ""]


def _stages(part: dict[str, Any]) -> list[str]:
    if not part["stages"]:
        return []
    lines = [_row(("what", "command", "engine", "CPU, user + system", *_STAGES, "rest")), "|" + " --- |" * 9]
    for step, found in part["stages"].items():
        total = found["engine_s"] * found["workers"]
        spent = [found["stages"].get(stage, {"seconds": 0.0})["seconds"] for stage in _STAGES]
        cpu = f"{found['user_s']:.2f} + {found['system_s']:.2f} s"
        shares = [f"{100 * seconds / total:.0f}%" for seconds in (*spent, max(0.0, total - sum(spent)))]
        lines.append(_row((step, f"{found['seconds']:.2f} s", f"{found['engine_s']:.2f} s", cpu, *shares)))
    return ["Where it goes, with a clock around each stage: shares of the workers' time.", "", *lines, ""]


def speed() -> list[str]:
    """The tables, host by host; none before the first measurement."""
    if not MEASURED.is_file():
        return []
    lines = [
        "## What is promised",
        "",
        "Whole processes in turns with `cp -r` or `cat` of the same bytes, page cache warm, no side waiting for the",
        "disk; medians of the rounds' own ratios (`make bench`). A ratio for `verify integrity` is one of speeds.",
        "",
    ]
    for host in json.loads(MEASURED.read_text(encoding="utf-8")).values():
        lines += [f"{host['host']}, {host['cores']} cores.", ""]
        for name, part in host["parts"].items():
            lines += _figures(name, part) + _stages(part)
    return lines
