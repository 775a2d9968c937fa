"""Megatron Core is imported by its doors alone, and by no command that does not run a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from _trees import ROOT, copied, lint


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("doors") / "tree")


@pytest.mark.parametrize(
    "line", ["from megatron.core import parallel_state", "def late() -> None:\n    import megatron.core"]
)
@pytest.mark.parametrize("file", ["mbx/train/run/loop.py", "mbx/models/megatron/build.py"])
def test_a_planted_import_breaks_the_contract(copy: Path, file: str, line: str) -> None:
    whole = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(f"{whole}\n\n{line}\n", encoding="utf-8")
    found = lint(copy, "--contract", "doors")
    (copy / file).write_text(whole, encoding="utf-8")
    assert found.returncode == 1, found.stdout + found.stderr
    assert file.removesuffix(".py").replace("/", ".") in found.stdout


def test_the_tree_as_it_stands_keeps_the_contract(copy: Path) -> None:
    found = lint(copy, "--contract", "doors")
    assert found.returncode == 0, found.stdout + found.stderr


def test_modules_behind_the_doors_cost_no_model_library_until_they_run() -> None:
    modules = """megatron.build megatron.config megatron.eviction megatron.rotary megatron.specs megatron.tracing
    megatron.weights forward.models forward.parity transformers.reference transformers.tracing device""".split()
    code = "\n".join(f"import mbx.models.{name}" for name in modules) + (
        "\nimport sys\nprint(sorted({'megatron', 'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
