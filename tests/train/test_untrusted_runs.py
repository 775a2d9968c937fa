"""Run folders that somebody else made: what a checkpoint names is refused or made inert, and never run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _trainings import Raw, raw, run_here

from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.models.inert_load import inert_loading
from mbx.torchfile.dcp import build_dcp_metadata, read_dcp
from mbx.train.checkpoints.state import latest
from mbx.train.run.report import read_metrics


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


class ToldApart:
    """Pickled as a call that makes a tensor's storage from the bytes of a file of `torch.save`."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[object, ...]:
        return torch.storage._load_from_bytes, (self.content,)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> object:
    """A delayed-scaling recipe, pickled by the name that Megatron Core's has; no GPU library is needed to read it."""
    name = "megatron.core.extensions.transformer_engine"
    module = ModuleType(name)
    kind = type("TEDelayedScaling", (), {"__module__": name})
    module.TEDelayedScaling = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    made = kind()
    made.__dict__.update(margin=0, amax_history_len=16, amax_compute_algo="most_recent")
    return made


def extra_state(recipe: object, **more: object) -> list[torch.Tensor]:
    """A module's state as Transformer Engine saves it under delayed scaling: the bytes of a pickle."""
    state = {"recipe": recipe, "scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3), **more}
    return [torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)]


def test_a_state_of_delayed_scaling_is_read(run: Path, recipe: object) -> None:
    """Its tensors lie in the pickle itself, as files of `torch.save`."""
    iteration = iteration_of(run)
    name = next(name for name in read_dcp(iteration).objects if "_extra_state" in name)
    with_object(iteration, name, extra_state(recipe, extra_fp8_variables={"num_gemms": 1}))
    with inert_loading(iteration):
        pass


@pytest.mark.parametrize("legacy", [True, False])
def test_what_a_storage_in_a_state_names_is_not_run(run: Path, recipe: object, tmp_path: Path, legacy: bool) -> None:
    """Transformer Engine unpickles the state, and torch then the bytes in it: with its restricted unpickler."""
    iteration, inner = iteration_of(run), io.BytesIO()
    torch.save(Bomb(tmp_path / "RAN"), inner, _use_new_zipfile_serialization=not legacy)
    name = next(name for name in read_dcp(iteration).objects if "_extra_state" in name)
    state = extra_state(recipe, scale_inv=ToldApart(inner.getvalue()))
    with_object(iteration, name, state)
    with inert_loading(iteration), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        pickle.loads(state[0].numpy().tobytes())
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "latest_checkpointed_iteration.tmp", "iter_0000002"])
def test_a_resumed_run_writes_through_no_link(run: Path, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    if name.startswith("iter"):
        precious.mkdir()
        (precious / "x").write_text("mine")
    else:
        precious.write_text("mine, without an end of line")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious)
    before = {path: path.is_file() and path.read_bytes() for path in (precious, *precious.rglob("*"))}
    with pytest.raises(StorageError, match="is a link; nothing was written through it"):
        run_here(short(run, 2), resume=True)
    assert {path: path.is_file() and path.read_bytes() for path in (precious, *precious.rglob("*"))} == before


def test_a_pipe_in_a_run_folder_is_not_waited_for(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(StorageError, match="no regular file"):
        run_here(short(run, 2), resume=True)
    with pytest.raises(StorageError, match="no regular file"):
        read_metrics(run)


def test_a_run_removes_its_own_checkpoints_alone(run: Path) -> None:
    """One that it did not finish goes; what is called alike, or holds more, stays."""
    (run / "iter_notes").mkdir()
    (run / "iter_notes" / "today.txt").write_text("mine")
    (run / "iter_0000009").mkdir()
    (run / "iter_0000009" / "today.txt").write_text("mine")
    (run / "iter_0000008").mkdir()
    (run / "iter_0000008" / "__0_0.distcp").write_bytes(b"x")
    run_here(short(run, 2), resume=True)
    assert {path.parent.name for path in run.glob("iter_*/today.txt")} == {"iter_notes", "iter_0000009"}
    assert not (run / "iter_0000008").exists()


def test_a_checkpoint_does_not_take_the_place_of_other_work(run: Path) -> None:
    (run / "iter_0000002").mkdir()
    (run / "iter_0000002" / "today.txt").write_text("mine")
    with pytest.raises(StorageError, match="is in the way"):
        run_here(short(run, 2), resume=True)
    assert (run / "iter_0000002" / "today.txt").read_text() == "mine"
