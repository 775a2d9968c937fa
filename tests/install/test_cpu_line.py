"""The documented line brings torch's CPU build and nothing of CUDA, whatever PyPI has: tried with pip on two indexes
whose wheels hold names and requirements alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mbx import extras
from mbx.extras import DISTRIBUTION, install_line

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA = "nvidia-cublas"


def publish(index: Path, name: str, version: str, requires: Sequence[str] = (), about: str = "") -> None:
    """Put a wheel without code into an index; `about` is its METADATA."""
    about = about or "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"] + [*map(_line, requires)])
    bare = name.replace("-", "_")
    folder, info = index / re.sub("[-_.]+", "-", name).lower(), f"{bare}-{version}.dist-info"
    files = {"METADATA": about, "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    files["RECORD"] = "".join(f"{info}/{file},,\n" for file in (*files, "RECORD"))
    folder.mkdir(parents=True, exist_ok=True)
    wheel = f"{bare}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{info}/{file}", text)
    page = folder / "index.html"
    page.write_text((page.read_text() if page.is_file() else "") + f'<a href="{wheel}">{wheel}</a>\n')


def _line(requirement: str) -> str:
    return f"Requires-Dist: {requirement}"


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """PyPI's, whose torch brings CUDA and is newer, and PyTorch's for CPUs."""
    pypi, cpu = (tmp_path_factory.mktemp(name) for name in ("pypi", "cpu"))
    mine = metadata.metadata(DISTRIBUTION)
    publish(pypi, DISTRIBUTION, mine["Version"], about=str(mine))
    needed = {Requirement(line).name for line in mine.get_all("Requires-Dist", [])} - {DISTRIBUTION, "torch"}
    for name in needed | {CUDA}:
        publish(pypi, name, "99")
    publish(pypi, "torch", "2.14.0", [CUDA])
    publish(cpu, "torch", "2.13.0+cpu")
    return pypi, cpu


def installed(line: str, indexes: tuple[Path, Path], folder: Path) -> dict[str, str]:
    """What the line brings into an empty environment: versions by name."""
    pypi, cpu = indexes
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    pip = folder / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {folder}/venv/bin/python "$@"\n')
    pip.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": pypi.as_uri(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    line = line.replace(CPU_INDEX, cpu.as_uri()).replace('".[', f'"{DISTRIBUTION}[')
    said = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr
    found = subprocess.run([pip, "list", "--format", "json"], env=environment, capture_output=True, check=True).stdout
    return {entry["name"]: entry["version"] for entry in json.loads(found)}


def documented() -> str:
    page = (ROOT / "docs" / "start" / "install.md").read_text(encoding="utf-8")
    found = re.search(r"^\| pip \| `[^`]+` \| `([^`]+)` \|$", page, re.M)
    assert found
    return found[1]


@pytest.mark.parametrize("of", ["the page", "a hint"])
def test_it_stays_without_cuda(
    monkeypatch: pytest.MonkeyPatch, indexes: tuple[Path, Path], tmp_path: Path, of: str
) -> None:
    monkeypatch.setattr(extras.sys, "platform", "linux")
    monkeypatch.setattr(extras, "_has_driver", lambda: False)
    monkeypatch.setattr(extras, "_source", lambda: f"'{DISTRIBUTION}")
    monkeypatch.setattr(extras, "_installer", lambda: "pip install")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    found = installed(documented() if of == "the page" else install_line("all"), indexes, tmp_path)
    assert found["torch"] == "2.13.0+cpu" and CUDA not in found
    assert {"megatron-core", "transformers", "peft", "datasets", "pillow"} <= found.keys()


def test_an_index_beside_pypi_would_not_do(indexes: tuple[Path, Path], tmp_path: Path) -> None:
    found = installed(f'pip install ".[torch]" --extra-index-url {CPU_INDEX}', indexes, tmp_path)
    assert found["torch"] == "2.14.0" and CUDA in found


@pytest.mark.parametrize("page", ["README.md", "docs/start/prove.md", "docs/start/train.md", "docker/cpu.Dockerfile"])
def test_no_other_place_says_it_otherwise(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"--index-url {CPU_INDEX}" in text and f"--extra-index-url {CPU_INDEX}" not in text
