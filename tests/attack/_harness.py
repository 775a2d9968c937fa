"""Workers that read hostile inputs, started again after each that one dies of; what all of them found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CANARY = "nobody writes here\n"


@dataclass
class Result:
    """What a run of inputs came to: each finding in words, with the number that makes it again."""

    name: str
    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    peak: int = 0
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.inputs} inputs, {self.inputs - self.accepted} refused, {self.accepted} accepted, "
            f"slowest {self.slowest:.2f} s, {self.peak / 1024:.0f} MiB above the start, {len(self.findings)} findings"
        )


def attack(name: str, seeds: Path, inputs: Sequence[int | Path], worker: str = "tests.attack._worker") -> Result:
    """Have workers read `inputs`: numbers of mutants, or files of the corpus."""
    result, todo = Result(name), list(inputs)
    with tempfile.TemporaryDirectory(prefix="mbx-attack-") as folder:
        outside = Path(folder, "outside")
        outside.mkdir()
        (outside / "canary").write_text(CANARY)
        while todo:
            done = _run(result, worker, seeds, Path(folder, f"work{len(todo)}"), todo)
            todo = todo[done:]
        beside = {path.name for path in Path(folder).iterdir() if not path.name.startswith("work")}
        if beside != {"outside"} or [path.name for path in outside.iterdir()] != ["canary"]:
            result.findings.append(f"files appeared outside: {beside} {list(outside.iterdir())}")
        if (outside / "canary").read_text() != CANARY:
            result.findings.append("the canary was changed")
    return result


def _run(result: Result, worker: str, seeds: Path, work: Path, todo: list[int | Path]) -> int:
    """One worker: how many of the inputs are done with, the one that it died of included."""
    work.mkdir()
    command = [sys.executable, "-m", worker, result.name, str(seeds), str(work)]
    asked = json.dumps([one if isinstance(one, int) else str(one) for one in todo])
    environment = {**os.environ, "TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        ended = subprocess.run(
            command, cwd=work, env=environment, input=asked, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        errors.seek(0)
        said = errors.read()[-3000:]
    ready, *lines = map(json.loads, ended.stdout.splitlines() or ["false"])
    if ready is not True:  # it could not import what it needs, or refuses the valid folder
        raise AssertionError(said)
    for number, line in zip(todo, lines, strict=False):
        result.inputs += 1
        result.accepted += line["accepted"]
        result.slowest = max(result.slowest, line["seconds"])
        result.peak = max(result.peak, line["peak"])
        if line["wrong"]:
            result.findings.append(f"{number} ({line['what']}): {line['wrong']}")
    if len(lines) == len(todo):
        return len(todo)
    result.inputs += 1
    result.findings.append(f"{todo[len(lines)]}: the worker died, {ended.returncode}: {said}")
    return len(lines) + 1
