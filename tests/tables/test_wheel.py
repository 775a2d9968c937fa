"""An installed wheel carries the tables, the recipes and the measured figures, and answers from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mbx.catalogue.models_page import rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, unpacked: what `pip install` puts on the path."""
    pytest.importorskip("setuptools", minversion="77")
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("mbx", "converters", "mappings"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(work), str(source)], check=True, capture_output=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


def test_models_list_has_the_measured_figures(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "mbx", "models", "list", "--json"]
    out = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    document = json.loads(out)
    found = {t["name"]: (t["cover"], t["weights"], t["forward_cpu"], t["forward_gpu"]) for t in document["tables"]}
    assert found == {row.table: (row.cover, row.weights, row.forward_cpu, row.forward_gpu) for row in rows()}
    assert any(char.isdigit() for char in found["llama"][2])
    assert {run["device"] for run in document["measured_with"]} == {"cpu", "cuda"}


def test_the_wheel_holds_every_data_file(installed: Path) -> None:
    for package in ("mbx", "converters", "mappings"):
        data = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*") if p.suffix in (".toml", ".json", ".typed")}
        assert data, package
        assert {path for path in data if not (installed / path).is_file()} == set()
