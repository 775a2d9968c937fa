"""A run that is killed or stopped, and continued, has the losses of one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from _trainings import QWEN3, Raw, raw, run_here, run_to_its_kill, start_world

from converters.errors import StorageError, UsageError
from mbx.train.run.log import METRICS


def recipe(run_dir: Path) -> Raw:
    return raw(
        run_dir,
        train={"steps": 8, "deterministic": True, "micro_batch": 2, "global_batch": 4},
        model={"config": {"attention_dropout": 0.1, "hidden_dropout": 0.1}},
        run={"save_every": 3},
    )


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_here(recipe(tmp_path_factory.mktemp("whole") / "run"))


def test_resume_after_kill(tmp_path: Path, whole: list[float]) -> None:
    run = tmp_path / "run"
    run_to_its_kill({"recipe": recipe(run), "kill_at": 5}, tmp_path / "first.json")
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "3"
    (run / "iter_0000006").mkdir()  # what a kill during the next save would leave: the tracker does not name it
    (run / "iter_0000006" / "__0_0.distcp").write_bytes(b"half")
    assert run_here(recipe(run), resume=True) == whole[3:]


def test_sigterm_saves_and_resumes(tmp_path: Path, whole: list[float]) -> None:
    run = tmp_path / "run"
    (stopped,) = start_world(1, [{"recipe": recipe(run), "stop_at": 4}], tmp_path / "first.json")
    assert stopped.wait(timeout=120) == 0
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert run_here(recipe(run), resume=True) == whole[4:]
    assert losses(run) == dict(enumerate(whole, 1))


def test_adapters_resume(tmp_path: Path) -> None:
    def lora(run: Path) -> Raw:
        return {**recipe(run), "lora": {"rank": 4, "dropout": 0.1}}

    expected = run_here(lora(tmp_path / "whole"))
    first = lora(tmp_path / "run")
    run_to_its_kill({"recipe": first, "kill_at": 4}, tmp_path / "first.json")
    assert run_here(first, resume=True) == expected[3:]
    saved = (tmp_path / "run" / "iter_0000008").stat()
    assert saved.st_size >= 0
    from mbx.formats.torch_dist import find_iteration
    from mbx.torchfile.dcp import read_dcp

    names = read_dcp(find_iteration(tmp_path / "run")).tensors
    assert {name for name in names if not name.startswith("optimizer")} == {
        name for name in names if ".lora_" in name and not name.startswith("optimizer")
    }, "an adapter run's checkpoint holds adapters only"


def test_adapters_find_their_base_again(tmp_path: Path) -> None:
    """A run whose base came from --init-from continues on that base, not on the recipe's model."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(QWEN3, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, other / "model.safetensors")

    def lora(name: str, steps: int) -> Raw:
        job = {**recipe(tmp_path / name), "lora": {"rank": 4}}
        job["train"] = {**job["train"], "steps": steps}
        job["optim"] = {"lr": 3e-3, "schedule": "constant"}
        return job

    whole = run_here(lora("whole", 4), init_from=str(other))
    assert run_here(lora("plain", 1))[0] != whole[0]
    assert run_here(lora("run", 2), init_from=str(other)) + run_here(lora("run", 4), resume=True) == whole
    shutil.rmtree(other)
    with pytest.raises(UsageError, match="base"):
        run_here(lora("run", 5), resume=True)


def test_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = recipe(run)
    first["train"]["steps"] = 1
    run_here(first)
    with pytest.raises(UsageError, match=r"train\.global_batch"):
        run_here({**first, "train": {**first["train"], "global_batch": 8}}, resume=True)
    same = {**first, "model": {**first["model"], "path": f"{QWEN3.parent}/./{QWEN3.name}/"}}
    assert run_here(same, resume=True) == []  # another spelling of a path is no change


def test_where_a_run_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StorageError, match="no checkpoint"):
        run_here(recipe(run), resume=True)
    with pytest.raises(UsageError, match="one of them"):
        run_here(recipe(run), resume=True, init_from="x")
    with pytest.raises(StorageError, match="does not exist"):
        run_here(recipe(run), init_from=str(tmp_path / "nowhere"))
    run.mkdir()
    (run / "something").write_text("")
    with pytest.raises(UsageError, match="not empty") as caught:
        run_here(recipe(run))
    with pytest.raises(StorageError, match="no checkpoint") as resumed:
        run_here(recipe(run), resume=True)
    for error in (caught.value, resumed.value):  # neither points at the other
        assert error.hint == "it holds no checkpoint: remove it, or run.dir=NAME starts another"


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    job = recipe(tmp_path / "run")
    job["run"] = {**job["run"], "save_every": 1, "keep": 2}
    job["train"] = {**job["train"], "steps": 4}
    run_here(job)
    assert sorted(p.name for p in (tmp_path / "run").glob("iter_*")) == ["iter_0000003", "iter_0000004"]


def test_adapters_keep_the_base_that_they_began_on(tmp_path: Path) -> None:
    """A run that others started from goes on; their frozen weights stay those of the iteration that it had."""
    every: dict[str, object] = {"save_every": 1, "keep": 0}

    def plain(steps: int) -> Raw:
        return raw(tmp_path / "first", train={"steps": steps, "global_batch": 2}, run=every)

    def again(**state: str) -> list[float]:
        shutil.rmtree(adapters / "iter_0000002")
        (adapters / "latest_checkpointed_iteration.txt").write_text("1")
        said.write_text(json.dumps(json.loads(said.read_text()) | state))
        return run_here(asked, resume=True)

    adapters = tmp_path / "adapters"
    said = adapters / "iter_0000001" / "mbx_train.json"
    asked = raw(adapters, train={"steps": 2, "global_batch": 2}, lora={"rank": 2}, run=every)
    run_here(plain(1))
    expected = run_here(asked, init_from=str(tmp_path / "first"))
    run_here(plain(2), resume=True)
    assert json.loads(said.read_text())["base"] == str(tmp_path / "first" / "iter_0000001")
    assert again() == expected[1:]
    assert again(base=str(tmp_path / "first")) != expected[1:]  # as older releases recorded it: read, and newer
