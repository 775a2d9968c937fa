"""Shared fixtures: the shipped checkpoints, and those that other tools made."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def pytest_configure(config: pytest.Config) -> None:
    """Unpack the checkpoints that Megatron-Bridge made, unless the environment names a folder with more of them."""
    if "MBX_PEER_CHECKPOINTS" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="mbx-peer-"))
    for archive in sorted((FIXTURES / "peer").glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    os.environ["MBX_PEER_CHECKPOINTS"] = str(folder)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the committed Hugging Face checkpoints."""
    return FIXTURES / "tiny"


@pytest.fixture(scope="session")
def peers() -> Path:
    """Folder of checkpoints made by other tools: `<name>/{hf,mcore}`."""
    return Path(os.environ["MBX_PEER_CHECKPOINTS"])
