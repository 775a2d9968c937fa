"""What stands beside the code says what the code is: licence, version, changelog, citation, images."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mbx.version import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_the_licence_is_the_one_that_is_stated() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_the_citation_names_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format asks for
    assert (cited["cff-version"], cited["license"], str(cited["version"])) == ("1.2.0", "Apache-2.0", __version__)


def test_the_changelog_has_this_version_first() -> None:
    versions = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions and versions[0] == __version__


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_made_as_its_file_says(file: Path) -> None:
    """The line that builds it, extras and files that are there, a base by its version."""
    text = file.read_text(encoding="utf-8")
    assert f"docker build -f docker/{file.name} " in text
    known = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", known, re.M) for extra in re.findall(r"/source\[(\w+)\]", text))
    assert all((ROOT / name).exists() for name in re.findall(r"/source/([\w./-]+)", text))
    assert all(":" in base and not base.endswith(":latest") for base in re.findall(r"^FROM (\S+)", text, re.M))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.stem)
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.is_file() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint has no build for this platform")
    said = subprocess.run([linter, str(file)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def test_what_an_image_copies_holds_no_secrets_and_no_tests() -> None:
    left_out = set((ROOT / ".dockerignore").read_text().split())
    assert {".git", ".venv", "fixtures", "tests"} <= left_out
