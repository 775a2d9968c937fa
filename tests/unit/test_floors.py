"""The house: every import contract fails when it is broken, and no file grows past what one reads in a sitting."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from _trees import ROOT, copied, lint

#: What breaks each contract: a module from above, or from outside.
PLANTED = {
    "floors: mbx, converters, mappings": ("converters/engine/plan.py", "mbx.text"),
    "floors inside the converters": ("converters/rows/ops.py", "converters.engine.plan"),
    "floors inside mbx": ("mbx/formats/hf.py", "mbx.run.job"),
    "floors inside the trainer": ("mbx/train/recipe/parse.py", "mbx.train.run.log"),
    "floors inside the verifier": ("mbx/proof/compare.py", "mbx.proof.parity"),
    "floors inside live models": ("mbx/live/source.py", "mbx.live.model"),
    "floors inside the models": ("mbx/models/stored.py", "mbx.models.forward.logits"),
    "the converters know no command line, no model library and no process group": ("converters/tensors.py", "typer"),
    "Megatron Core is imported through its doors alone": ("mbx/train/run/loop.py", "megatron.core"),
}
MOST_LINES = 320


def test_each_contract_fails_when_it_is_broken(tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    for file, module in PLANTED.values():
        path = tree / file
        assert path.is_file()
        path.write_text(f"{path.read_text(encoding='utf-8')}\n\nimport {module}\n", encoding="utf-8")
    found = lint(tree)
    assert found.returncode == 1
    assert f"Contracts: 0 kept, {len(PLANTED)} broken." in found.stdout, found.stdout
    assert all(f"{name} BROKEN" in found.stdout for name in PLANTED), found.stdout


def test_a_package_that_no_contract_knows_is_refused(tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    (tree / "mbx" / "attic").mkdir()
    (tree / "mbx" / "attic" / "__init__.py").write_text('"""Nowhere."""\n')
    found = lint(tree)
    assert found.returncode == 1 and "- mbx.attic" in found.stdout


@pytest.mark.parametrize("package", ["mbx", "converters"])
def test_no_file_is_longer_than_one_reads(package: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / package).rglob("*.py")}
    assert len(lengths) > 50
    assert {str(path): length for path, length in lengths.items() if length > MOST_LINES} == {}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_nothing_lies_about_at_the_top() -> None:
    """Folders that are tracked: what a trial leaves behind in a checkout is easily added with the rest."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {name.partition("/")[0] for name in tracked.splitlines() if "/" in name}
    code = {"mbx", "converters", "mappings", "tests", "fixtures", "benchmarks", "pages"}
    assert folders == code | {".ci", "docker", "docs", "examples"}
