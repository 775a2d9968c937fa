"""Shared fixtures: the shipped checkpoints, and those that other tools made."""

from __future__ import annotations

import gc
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline of an example measures the load of the machine; a test has its own limit.
settings.register_profile("mbx", deadline=None)
settings.load_profile("mbx")

#: More threads than one test with live models has of its own.
_MANY_THREADS = 100
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def pytest_configure(config: pytest.Config) -> None:
    """Prepared data goes where it is thrown away. Checkpoints that Megatron-Bridge made are unpacked, unless the
    environment names a folder with more of them."""
    if "MBX_CACHE_DIR" not in os.environ:
        cache = os.environ["MBX_CACHE_DIR"] = tempfile.mkdtemp(prefix="mbx-cache-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    if "MBX_PEER_CHECKPOINTS" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="mbx-peer-"))
    for archive in sorted((FIXTURES / "peer").glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    os.environ["MBX_PEER_CHECKPOINTS"] = str(folder)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True)
def _no_leftover_groups() -> Iterator[None]:
    """Free the process groups of models that only the collector can free: each has threads that wake all the time.

    A test with models leaves some twenty of them; after a few hundred tests they took half of every core.
    """
    yield
    if len(os.listdir("/proc/self/task")) > _MANY_THREADS:
        gc.collect()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the committed Hugging Face checkpoints."""
    return FIXTURES / "tiny"


@pytest.fixture(scope="session")
def peers() -> Path:
    """Folder of checkpoints made by other tools: `<name>/{hf,mcore}`."""
    return Path(os.environ["MBX_PEER_CHECKPOINTS"])
