"""Run folders that somebody else made: what a checkpoint names is refused or made inert, and never run."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from _trainings import Raw, raw, run_here

from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.torchfile.dcp import build_dcp_metadata, read_dcp
from mbx.train.checkpoints.state import latest


def short(folder: Path, steps: int) -> Raw:
    return raw(folder, train={"steps": steps, "micro_batch": 2, "global_batch": 4})


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("untrusted") / "run"
    run_here(short(run, 1))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def iteration_of(run: Path) -> Path:
    found = latest(run)
    assert found is not None
    return found


def with_object(iteration: Path, name: str, value: object) -> None:
    """Put another stored object in place of one of a checkpoint, by whatever pickle torch makes of it."""
    held = read_dcp(iteration)
    file = "__9_0.distcp"
    torch.save(value, iteration / file)
    objects = {**held.objects, name: (file, 0, (iteration / file).stat().st_size)}
    tensors: list[StoredTensor] = list(held.tensors.values())
    (iteration / ".metadata").write_bytes(build_dcp_metadata(tensors, objects))


def test_what_an_index_names_is_not_run(run: Path, tmp_path: Path) -> None:
    """The run goes on: a saver's own data in the index is of no use to a reader."""
    index = iteration_of(run) / ".metadata"
    found = pickle.loads(index.read_bytes())
    found.planner_data = Bomb(tmp_path / "RAN")
    index.write_bytes(pickle.dumps(found))
    assert len(run_here(short(run, 2), resume=True)) == 1
    assert not (tmp_path / "RAN").exists()


def test_an_index_that_leads_out_of_the_folder_is_refused(run: Path) -> None:
    iteration = iteration_of(run)
    found = pickle.loads((iteration / ".metadata").read_bytes())
    for info in found.storage_data.values():
        info.relative_path = str(iteration / info.relative_path)
    (iteration / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(StorageError, match="outside the checkpoint"):
        run_here(short(run, 2), resume=True)


@pytest.mark.parametrize("kind", ["common state", "random state", "extra state"])
def test_objects_that_name_other_classes_are_refused(run: Path, tmp_path: Path, kind: str) -> None:
    iteration, bomb = iteration_of(run), Bomb(tmp_path / "RAN")
    names = read_dcp(iteration).objects
    if kind == "common state":
        torch.save({"iteration": 1, "checkpoint_version": 3.0, "more": bomb}, iteration / "common.pt")
    elif kind == "random state":
        with_object(iteration, next(name for name in names if name.startswith("rng_state")), [bomb])
    else:
        payload = torch.frombuffer(bytearray(pickle.dumps(bomb)), dtype=torch.uint8)
        with_object(iteration, next(name for name in names if "_extra_state" in name), [payload])
    with pytest.raises(StorageError, match=r"names '(posix|nt)\.mkdir', which is not a class that mbx reads"):
        run_here(short(run, 2), resume=True)
    assert not (tmp_path / "RAN").exists()
