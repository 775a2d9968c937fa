"""A fresh environment of every interpreter that is there: small, soon installed, and enough to convert."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from _without import run_all_by

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "fixtures" / "tiny" / "llama"
MIB = 1 << 20


def _interpreter(version: str) -> str | None:
    """A Python of that version: on the path, or where pyenv keeps them."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted(root.glob(f"versions/{version}.*/bin/python"))
    found = str(kept[-1]) if kept else shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "--version"], capture_output=True).returncode:
        return None
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_core_installs_small_and_converts(version: str, tmp_path: Path) -> None:
    python = _interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "demo", "fixtures", "__pycache__"))
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    binary = tmp_path / "venv" / "bin" / "python"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run([binary, "-m", "pip", "install", "-q", str(source)], check=True, cwd=tmp_path)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    # half a minute of a processor: how long it takes beside other work says nothing of the installation
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 30
    files = {
        (entry.stat().st_ino, entry.stat().st_size) for entry in (tmp_path / "venv").rglob("*") if entry.is_file()
    }
    nbytes = sum(size for _, size in files)
    assert nbytes <= 200 * MIB, f"{nbytes / MIB:.0f} MiB, installed in {took:.0f} s"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    commands: list[tuple[object, ...]] = [
        ("convert", "hf-to-mcore", LLAMA, "mcore", "--tp", "2"),
        ("convert", "mcore-to-hf", "mcore", "hf"),
        ("verify", "parity", LLAMA, "mcore"),
        ("diff", LLAMA, "hf"),
        ("inspect", "mcore"),
    ]
    said = run_all_by(str(binary), environment, *commands, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
