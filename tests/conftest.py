"""Shared fixtures: the shipped checkpoints, and those that other tools made."""

from __future__ import annotations

import gc
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from _typeshed import HasFileno

# A deadline of an example measures the load of the machine; a test has its own limit.
settings.register_profile("mbx", deadline=None)
settings.load_profile("mbx")
# Among the objects of torch and Transformers, the collector's rounds took a quarter of the time of tests that plan.
gc.set_threshold(20_000, 20, 100)

#: Files whose few tests take longest, as whole jobs of several processes do: they begin first, so that no worker of
#: `make test` ends alone with one.
_LONG = (
    "parity/test_layout_oracle.py",
    "train/test_parallel.py",
    "train/test_distill.py",
    "train/test_own_methods.py",
    "train/test_resume_elsewhere.py",
    "parity/test_optimizer_oracle.py",
    "parity/test_convert_parity.py",
    "train/test_sequence_parallel.py",
    "train/test_proof_families.py",
    "train/test_cli.py",
    "live/test_live.py",
    "parity/test_ci.py",
    "train/test_images.py",
    "tables/test_families_dense.py",
    "tables/test_families_moe.py",
)
#: More threads than one test with live models has of its own.
_MANY_THREADS = 100
_TASKS = Path("/proc/self/task")
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def _checked(file: int | HasFileno) -> None:
    """Stands for `os.fsync` in the tests' own process: OSError where there is no such file, and no wait for the disk.

    No test could see what a flush is for, as none takes the power away; thousands of them took 7 % of the time of
    tests that convert. Tests of flushes that fail put their own in its place; processes that a test starts flush.
    """
    os.fstat(file if isinstance(file, int) else file.fileno())


def pytest_configure(config: pytest.Config) -> None:
    """Prepared data goes where it is thrown away. Checkpoints that Megatron-Bridge made are unpacked, unless the
    environment names a folder with more of them. Torch computes on one thread, unless the environment says how many:
    threads that wait for each other over tiny tensors take twice the time of two cores that two workers share."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.fsync = _checked
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, a file's tests staying together; `make test` keeps the order that this gives."""
    tests = FIXTURES.parent / "tests"
    place = {tests / name: at for at, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path, len(_LONG)))


def pytest_collection_finish() -> None:
    """What collection imported and made stays to the end: the collector's rounds pass it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _kept_threads() -> list[int]:
    """How many threads the last round of the collector left, in one place."""
    return [0]


@pytest.fixture(autouse=True)
def _no_leftover_groups(_kept_threads: list[int]) -> Iterator[None]:
    """Free the process groups of models that only the collector can free: each has threads that wake all the time.

    A test with models leaves some twenty of them; after a few hundred tests they took half of every core. Threads that
    a round cannot end are no reason for another round behind each test that follows.
    """
    yield
    if len(os.listdir(_TASKS)) > _kept_threads[0] + _MANY_THREADS:
        gc.collect()
        _kept_threads[0] = len(os.listdir(_TASKS))


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the committed Hugging Face checkpoints."""
    return FIXTURES / "tiny"


@pytest.fixture(scope="session")
def peers() -> Path:
    """Folder of checkpoints made by other tools: `<name>/{hf,mcore}`."""
    return Path(os.environ["MBX_PEER_CHECKPOINTS"])
