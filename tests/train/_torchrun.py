"""Runs under torchrun that a test disturbs: how they are started, watched and found out about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from _trainings import Raw

from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.toml import dump_toml


def start(folder: Path, recipe: Raw, ranks: int, restarts: int) -> subprocess.Popen[bytes]:
    """Start a recipe on gloo as `--launch` says; what it prints goes to `folder`/log."""
    file = folder / "recipe.toml"
    file.write_text(dump_toml(parse_recipe(recipe).to_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = ["-m", "mbx", "train", "--recipe", str(file), "--continue", "-q"]
    # a rank that was stopped does not hear torchrun's SIGTERM: it is killed so many seconds later
    command = [*torchrun, "--shutdown-timeout", "5", "--max-restarts", str(restarts), *words]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def records(run: Path) -> list[tuple[int, float]]:
    """Step and loss of what a run has said so far, in order."""
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError:  # not there yet, or away
        return []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    return [(record["step"], record["loss"]) for record in read if record["kind"] == "step"]


def workers(agent: int) -> list[int]:
    """Processes of torchrun's ranks."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []
