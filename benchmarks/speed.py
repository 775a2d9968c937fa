"""What mbx promises of its speed, measured: whole processes beside `cp -r` and `cat` of the same bytes, in pairs.

    python -m benchmarks.speed --json fixtures/measured/speed.json --all-cores 8b --host "a quiet host, local NVMe"

Each round runs every step one after another on a warm page cache, with everything flushed before each, so that a
noisy host is noisy for all; a figure is the median of its rounds' own ratios, after a round that only warms up.
No side waits for the disk. The first part is bound to two processors, with 2.5 GB of bf16; the second, on demand,
has all of them. Weights are normally distributed, as those of a model are, so that a cast meets what it would meet.
Each result is stored as soon as it is there, under the number of cores, beside those of other hosts. `stages` says
where the workers' time goes, in processes with a clock around each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bench import bytes_in, cat, once, remove
from benchmarks.checkpoints import SIZES, make
from benchmarks.conversion import ROOT, Sample, compiled, mbx

#: A figure by name: what it compares, whether it is a speed (of the second over the first), and its target by part.
FIGURES: dict[str, tuple[str, str, bool, dict[str, float]]] = {
    "import": ("import", "cp", False, {"two cores": 0.9, "all cores": 0.4}),
    "export": ("export", "cp", False, {"two cores": 1.0, "all cores": 0.5}),
    "export --codec fp8_block": ("export --codec fp8_block", "cp", False, {"all cores": 2.0}),
    "import --dtype fp16": ("import --dtype fp16", "cp", False, {"two cores": 1.5}),
    "verify integrity, speed": ("verify integrity", "cat", True, {"two cores": 0.9, "all cores": 0.9}),
}


def ratio(name: str, steps: dict[str, list[dict[str, float]]]) -> float:
    """The median over the rounds of a figure."""
    step, base, speed, _ = FIGURES[name]
    pairs = [(a["seconds"], b["seconds"]) for a, b in zip(steps[step], steps[base], strict=True)]
    return statistics.median(b / a if speed else a / b for a, b in pairs)


def met(name: str, part: str, found: float) -> bool | None:
    """Whether a figure reaches its target; None where it has none."""
    _, _, speed, targets = FIGURES[name]
    if part not in targets:
        return None
    return found >= targets[part] if speed else found <= targets[part]


class Part:
    """One part: a source in the page cache, and commands that are measured in turns."""

    def __init__(self, name: str, work: Path, size: str, deadline: float) -> None:
        self.name, self.size, self.deadline = name, size, deadline
        self.source, self.mcore = work / "source", work / "mcore"
        self.copy, self.back, self.half = work / "copy", work / "back", work / "half"
        make(self.source, size, weights=True)
        os.sync()
        cat(self.source)

    def steps(self) -> dict[str, Callable[[], Sample]]:
        """Every step by name, in the order of a round; what one leaves is removed when the round needs it no more."""
        quick = "--no-sync"
        to_mcore = mbx("convert", "hf-to-mcore", self.source, self.mcore, quick)
        to_half = mbx("convert", "hf-to-mcore", self.source, self.half, quick, "--dtype", "fp16")
        steps: dict[str, Callable[[], Sample]] = {
            "cp": lambda: self._made(["cp", "-r", str(self.source), str(self.copy)], self.copy),
            "import": lambda: once(to_mcore, self.mcore),
            "export": lambda: self._made(mbx("convert", "mcore-to-hf", self.mcore, self.back, quick), self.back),
            "cat": lambda: cat(self.mcore),
            "verify integrity": lambda: once(mbx("verify", "integrity", self.mcore)),
        }
        to_fp8 = mbx("convert", "mcore-to-hf", self.mcore, self.back, quick, "--codec", "fp8_block")
        if self.name == "all cores":
            steps["export --codec fp8_block"] = lambda: self._made(to_fp8, self.back)
        if self.name == "two cores":
            steps["import --dtype fp16"] = lambda: self._made(to_half, self.half)
        return steps

    @staticmethod
    def _made(command: list[str], target: Path) -> Sample:
        try:
            return once(command, target)
        finally:
            remove(target)

    def measure(self, count: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """`count` rounds, or as many as there is time for."""
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in self.steps()}
        result: dict[str, Any] = {"size": self.size, "bytes": bytes_in(self.source), "steps": steps, "stages": {}}
        for number in range(count + 1):
            started = time.monotonic()
            for name, step in self.steps().items():
                sample = step()
                print(f"{self.name:<10} round {number} {name:<22} {sample.seconds:6.2f} s", flush=True)
                if number:
                    steps[name].append(asdict(sample))
            save(result)
            if time.monotonic() + (time.monotonic() - started) > self.deadline and number:
                print(f"{self.name}: no time for more than {number} rounds", flush=True)
                break
        for name in FIGURES:
            if FIGURES[name][0] in steps:
                found = ratio(name, steps)
                verdict = {True: "met", False: "missed", None: ""}[met(name, self.name, found)]
                target = FIGURES[name][3].get(self.name, "none")
                print(f"{self.name:<10} {name:<26} {found:6.2f} x {FIGURES[name][1]} (target {target}) {verdict}")
        return result

    def stages(self, result: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
        """Where the workers' time goes, once a step."""
        out = self.source.parent / "stages.json"
        commands = {
            "import": ("hf-to-mcore", self.source, self.copy),
            "export": ("mcore-to-hf", self.mcore, self.copy),
            "export --codec fp8_block": ("mcore-to-hf", self.mcore, self.copy, "--codec", "fp8_block"),
            "import --dtype fp16": ("hf-to-mcore", self.source, self.copy, "--dtype", "fp16"),
        }
        for name, words in commands.items():
            if name not in result["steps"] or time.monotonic() > self.deadline:
                continue
            arguments = map(str, ("convert", *words, "--no-sync", "-qq"))
            os.sync()
            command = [sys.executable, "-m", "benchmarks.stages", str(out), *arguments]
            subprocess.run(command, check=True, cwd=ROOT, env=compiled())
            result["stages"][name] = json.loads(out.read_text(encoding="utf-8"))
            print(f"{self.name:<10} {name}: {json.dumps(result['stages'][name])}", flush=True)
            save(result)
            remove(self.copy)


@contextmanager
def bound(processors: int | None) -> Iterator[None]:
    """This process, and those it starts, on so many processors; None leaves them as they are."""
    before = os.sched_getaffinity(0)
    if processors is not None:
        os.sched_setaffinity(0, sorted(before)[:processors])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def main() -> None:
    """Parse the command line, measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results; what it has of others is kept")
    parser.add_argument("--size", default="1b", choices=sorted(SIZES), help="of the part on two cores")
    parser.add_argument("--all-cores", choices=sorted(SIZES), help="also this size on all cores: 8b is 16 GB")
    parser.add_argument("--only", choices=("two cores", "all cores"), help="the other part stays as it was measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to work; needs three times the size")
    parser.add_argument("--host", default=platform.platform(), help="how the page names this host")
    parser.add_argument("--minutes", type=float, default=60, help="start no round that would end after so long")
    chosen = parser.parse_args()
    start, cores = time.monotonic(), len(os.sched_getaffinity(0))
    document = json.loads(chosen.json.read_text(encoding="utf-8")) if chosen.json.is_file() else {}
    before = document.get(f"{cores} cores", {}) if chosen.only else {}
    parts: dict[str, Any] = before.get("parts", {})
    document[f"{cores} cores"] = {"host": chosen.host, "cores": cores, "parts": parts}
    # Two cores get at most 40 % of the time where all cores follow.
    plan = [("two cores", chosen.size, 2, 0.4 if chosen.all_cores else 1.0)]
    if chosen.all_cores:
        plan.append(("all cores", chosen.all_cores, None, 1.0))
    for name, size, processors, share in plan:
        if chosen.only not in (None, name):
            continue

        def save(result: dict[str, Any], name: str = name) -> None:
            parts[name] = result
            chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

        with tempfile.TemporaryDirectory(dir=chosen.dir, prefix="mbx-speed-") as folder, bound(processors):
            part = Part(name, Path(folder), size, start + 60 * chosen.minutes * share)
            part.stages(part.measure(chosen.rounds, save), save)


if __name__ == "__main__":
    main()
