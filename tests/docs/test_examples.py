"""Every example runs on a CPU, in a folder of its own, and the list of them is whole."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _command_line import fault
from _pages import ROOT

EXAMPLES = ROOT / "examples"
PROGRAMS = sorted((*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SLOW = {"merge_lora", "own_adapter", "own_loss", "train_tiny"}


def _param(path: Path) -> object:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


@pytest.mark.parametrize("program", [_param(path) for path in PROGRAMS])
def test_an_example_runs(program: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MBX_NO_CONFIG": "1",
    }
    command = ["bash", str(program)] if program.suffix == ".sh" else [sys.executable, str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 2


def test_the_list_is_whole() -> None:
    listed = re.findall(r"^\| \[(.*?)\]\((.*?)\)", (EXAMPLES / "README.md").read_text(), re.M)
    assert all(name == target for name, target in listed)
    assert {name for name, _ in listed} == {path.name for path in (*PROGRAMS, *NOTEBOOKS)}


def _cells(notebook: Path) -> list[dict[str, object]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert isinstance(cells, list)
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_well_formed_and_holds_no_old_output(notebook: Path) -> None:
    for cell in _cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        lines = "".join(cell["source"]).split("\n")  # type: ignore[arg-type]
        commands = [line[1:] for line in lines if line.startswith("!")]
        ast.parse("\n".join(line for line in lines if not line.startswith("!")))
        for command in commands:
            words = re.sub(r"\{SETTINGS\}", "", command).replace("{LLAMA}", "llama").split()
            assert fault(words) is None, command


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed: make notebooks")
    import nbformat

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MBX_NO_CONFIG", "1")
    read = nbformat.read(notebook, 4)
    nbclient.NotebookClient(read, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert all(cell.execution_count for cell in read.cells if cell.cell_type == "code")
    assert any(output.output_type == "display_data" for cell in read.cells for output in cell.get("outputs", ()))
