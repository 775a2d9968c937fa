"""Carries out a matrix: each cell a process of its own, results kept, so that a matrix that was stopped goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters.errors import StorageError
from mbx.train.matrix.cells import Cell
from mbx.untrusted.names import writable
from mbx.untrusted.small_files import read_json

Record = dict[str, Any]


def run_matrix(
    folder: Path,
    recipe: str,
    overrides: Sequence[str],
    planned: Sequence[Cell],
    steps: int,
    say: Callable[[str], None],
    limit_s: float,
) -> list[Record]:
    """The record of each cell, in order. A cell whose result lies in `folder` is not run again; `limit_s` a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, cell in enumerate(planned, 1):
        digest = cell.digest(recipe, overrides, steps)
        cells = writable(folder, "cells")
        cells.mkdir(exist_ok=True)
        file = writable(cells, f"{cell.name.replace('=', '-')}.json")
        found = _kept(file, digest)
        if found is None:
            say(f"{number}/{len(planned)} {cell.name}: running")
            found = _run(folder, recipe, overrides, cell, steps, limit_s)
            found |= {"cell": asdict(cell), "digest": digest}
            file.write_text(json.dumps(found), encoding="utf-8")
        say(f"{number}/{len(planned)} {line(found)}")
        records.append(found)
    return records


def line(record: Record) -> str:
    """One record in a line."""
    name, status = record["cell"]["name"], record["status"]
    if status != "ok":
        return f"{name}: {status}: {' '.join(record['said'][:1])}"
    return f"{name}: {record['tokens_per_s']:,.0f} tokens/s, {record['peak_gib']:.2f} GiB"


def _kept(file: Path, digest: str) -> Record | None:
    """A result of an earlier start: measured, or known not to fit. What failed otherwise is tried again."""
    if not file.is_file():
        return None
    try:
        found = read_json(file)
        return found if found["digest"] == digest and found["status"] in ("ok", "out of memory") else None
    except (StorageError, KeyError) as error:
        raise StorageError(f"`{file}` is no result of a matrix", hint="remove it") from error


def _run(folder: Path, recipe: str, overrides: Sequence[str], cell: Cell, steps: int, limit_s: float) -> Record:
    spec, out, log = (writable(folder, name) for name in ("spec.json", "record.json", "process.log"))
    out.unlink(missing_ok=True)
    content = {"cell": asdict(cell), "recipe": recipe, "overrides": list(overrides), "steps": steps}
    run_dir = writable(folder, "run")
    spec.write_text(json.dumps(content | {"run_dir": str(run_dir)}), encoding="utf-8")
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    module = ["-m", "mbx.train.matrix.process", str(spec), str(out)]
    if cell.world_size > 1:
        spread = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.world_size)]
        module = [*spread, *module]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, *module], stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if out.is_file():
        record: Record = json.loads(out.read_text(encoding="utf-8"))
        return record
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
    if code is None:
        return {"status": "failed", "said": [f"it ran longer than {limit_s:g} s", *last]}
    if code == -signal.SIGKILL:
        return {
            "status": "out of memory",
            "said": ["the system killed it, as it does when the host has no memory left"],
        }
    return {"status": "failed", "said": [f"the process ended with {code}", *last]}
