"""Hostile files of every kind: refused as an MbxError or read, in bounded time and memory, with nothing else touched.

A few mutants of each kind run here, and all of the corpus. `make attack` runs as many as MBX_ATTACK_INPUTS says, from
the number MBX_ATTACK_FIRST on, so that several machines or processes can share them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.attack._harness import attack
from tests.attack._planted import FAULTS
from tests.attack._targets import TARGETS, make_seeds

CORPUS = Path(__file__).parent / "corpus"
ASKED = os.environ.get("MBX_ATTACK_INPUTS")
FIRST = int(os.environ.get("MBX_ATTACK_FIRST", "0"))
FEW = 8
pytestmark = pytest.mark.timeout(100 + int(ASKED or 0) * 4)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_files(seeds: Path, name: str) -> None:
    corpus = sorted((CORPUS / name).glob("*@*"))
    inputs = [*corpus, *range(FIRST, FIRST + int(ASKED or FEW))]
    result = attack(name, seeds, inputs)
    if ASKED:
        sys.stdout.write(f"\n{result}\n")
    assert not result.findings, "\n".join(result.findings)
    assert result.inputs == len(inputs)


def test_every_folder_of_the_corpus_is_read() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} <= set(TARGETS)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_watch_sees(seeds: Path, fault: str) -> None:
    words = {
        "write": "open to write",
        "make": "os.mkdir",
        "hang": "Timeout",
        "grow": "MemoryError",
        "import": "ran code",
        "start": "started",
        "system": "os.system",
        "socket": "socket.__new__",
        "raise": "ValueError",
        "die": "the worker died, 3",
    }
    result = attack(fault, seeds, range(1), worker="tests.attack._planted")
    assert result.inputs == 1
    assert any(words[fault] in finding for finding in result.findings), result.findings
