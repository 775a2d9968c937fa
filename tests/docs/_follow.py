"""Follow a page as its reader does: its commands and Python, in order, in an empty folder; what they print is held
against what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from _pages import ROOT, Block, blocks

_PREPARED = re.compile(r"<!-- prepare\n(.*?)-->", re.S)


@dataclass
class Followed:
    """What came of a page: how many of its blocks ran, and what they did not do as it says."""

    ran: int = 0
    held: int = 0
    faults: list[str] = field(default_factory=list)


def follow(page: Path, folder: Path, limit_s: float = 300.0) -> Followed:
    """Run a page's blocks in `folder`, where `fixtures` and `examples` lie as in a clone; up to the first that fails.

    Blocks of `sh` and `python` run unless a comment before them says why not; a block of `text` behind one holds what
    it prints, `…` standing for anything.
    """
    for name in ("fixtures", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
        "MBX_NO_CONFIG": "1",
        "MBX_NO_PROGRESS": "1",
        "COLUMNS": "80",
    }

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=limit_s,
        )  # fmt: skip

    done, printed = Followed(), ""
    for text in _PREPARED.findall(page.read_text(encoding="utf-8")):
        prepared = run(["bash", "-euo", "pipefail", "-c", text])
        assert prepared.returncode == 0, prepared.stdout
    for block in blocks(page):
        if block.language == "text" and printed:
            done.held += 1
            if missing := not_printed(block.text, printed):
                done.faults.append(f"{block.place}: not printed: {missing!r}, but:\n{printed}")
            printed = ""
            continue
        command = _command(block)
        if command is None:
            printed = ""
            continue
        found = run(command)
        done.ran += 1
        printed = found.stdout
        if found.returncode:
            done.faults.append(f"{block.place}: exit code {found.returncode}\n{found.stdout[-3000:]}")
            break
    return done


def _command(block: Block) -> list[str] | None:
    if block.not_run:
        return None
    if block.language == "sh":
        return ["bash", "-euo", "pipefail", "-c", block.text]
    return [sys.executable, "-c", block.text] if block.language == "python" else None


def not_printed(shown: str, printed: str) -> str | None:
    """The first line of `shown` that was not printed, in its order; None where all were. `…` stands for anything."""
    lines = iter(" ".join(line.split()) for line in printed.splitlines())
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        if wanted in ("", "…"):
            continue
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        if not any(pattern.fullmatch(found) for found in lines):
            return line
    return None
