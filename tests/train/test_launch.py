"""How runs are launched: the printed lines are torchrun's own and a shell's, and starting again goes on."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
from _trainings import raw, run_here

from converters.errors import DeviceError, UsageError
from mbx.cli import main
from mbx.formats.torch_dist import TRACKER
from mbx.train.checkpoints import complete
from mbx.train.checkpoints.best import Best, write_best
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.launch import Machines, machines_for, slurm_script, torchrun_line
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.log import METRICS
from mbx.train.run.prepare import prepare

WORDS = ["train", "--recipe", "qwen3_8b_lora", "data=my chats.jsonl", "--continue"]


def expanded(line: str, **variables: str) -> list[str]:
    """What a shell hands to torchrun."""
    script = f'torchrun() {{ printf "%s\\n" "$@"; }}; srun() {{ shift; "$@"; }}; env() {{ shift; "$@"; }}\n{line}'
    done = subprocess.run(["bash", "-euc", script], env=variables, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("nodes", "gpus", "restarts"), [(1, 1, 0), (1, 8, 3), (4, 8, 2)])
def test_torchrun_reads_its_line(nodes: int, gpus: int, restarts: int) -> None:
    run = pytest.importorskip("torch.distributed.run")
    line = torchrun_line(WORDS, Machines(nodes, gpus, restarts), name="mine")
    read = run.get_args_parser().parse_args(expanded(line, HEAD="node0"))
    assert (read.nnodes, read.nproc_per_node, read.max_restarts) == (
        str(nodes) if nodes > 1 else "1:1",
        str(gpus),
        restarts,
    )
    assert read.module and [read.training_script, *read.training_script_args] == ["mbx", *WORDS]
    if nodes > 1:
        assert (read.rdzv_backend, read.rdzv_id, read.rdzv_endpoint) == ("c10d", "mine", "node0:29500")
        failed = subprocess.run(["bash", "-c", line], env={}, capture_output=True, text=True, timeout=60)
        assert failed.returncode and "the first node" in failed.stderr


def test_the_slurm_script_is_a_shells_and_starts_the_same_line() -> None:
    recipe = load_recipe("qwen3_8b_lora", ["parallel.tp=2"])
    script = slurm_script(recipe, WORDS, machines_for(recipe, 2, 4, 3))
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.M))
    assert asked.keys() >= {"nodes", "ntasks-per-node", "gpus-per-node", "requeue"} and asked["nodes"] == "2"
    variables = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-1]"}
    words = expanded('scontrol() { printf "n0\\nn1\\n"; }; head() { command -p head "$@"; }\n' + script, **variables)
    run = pytest.importorskip("torch.distributed.run")
    read = run.get_args_parser().parse_args(words)
    assert (read.rdzv_endpoint, read.rdzv_id, read.max_restarts) == ("n0:29500", "77", 3)
    assert read.training_script_args == WORDS


@pytest.mark.parametrize("word", ["--dry-run", "--show", "--list", "--show-data"])
def test_a_launch_and_a_look_are_two_commands(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *WORDS[1:-1], "--launch", "torchrun", word]) == 2
    assert f"--launch prints how to start a run, and {word} looks at it" in capsys.readouterr().err


def test_a_launch_resumes_where_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--resume", "--continue"):
        assert main(["train", *WORDS[1:-1], "--launch", "torchrun", word]) == 0
        assert capsys.readouterr().out.split()[-1] == word
    assert main(["train", *WORDS[1:-1], "--launch", "torchrun", "--resume", "--continue"]) == 2


def test_ranks_that_do_not_meet_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the others should be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=f"rank 1 of 2 did not meet the others at 127.0.0.1:{port} within 1 s"):
        run_here(raw(tmp_path / "run", run={"timeout_s": 1}))


def test_machines_are_as_few_as_the_axes_take() -> None:
    recipe = load_recipe("qwen3_8b_lora", ["parallel.tp=2", "parallel.pp=4"])
    assert machines_for(recipe, 2, None, 0) == Machines(2, 4, 0)
    assert machines_for(load_recipe("qwen3_8b_lora", ["parallel.tp=2"]), 2, None, 0) == Machines(2, 2, 0)
    with pytest.raises(UsageError, match="does not divide"):
        machines_for(recipe, 1, 6, 0)
    with pytest.raises(UsageError, match="would cross nodes"):
        machines_for(recipe, 8, 1, 0)


def test_continuing_begins_and_then_resumes(tmp_path: Path) -> None:
    """The same call twice: the first trains from the start, the second goes on where the first saved."""
    short, long = {"train": {"steps": 3}}, {"train": {"steps": 6}}
    asked = [run_here(raw(tmp_path / "a", **one), anew=True) for one in (short, long)]
    told = [run_here(raw(tmp_path / "b", **one), resume=one is long) for one in (short, long)]
    assert asked == told and [len(losses) for losses in asked] == [3, 3]


def test_what_a_start_left_before_its_first_checkpoint_is_in_nobodys_way(tmp_path: Path) -> None:
    run = tmp_path / "run"
    unfinished = run / "iter_0000002"
    unfinished.mkdir(parents=True)
    (run / METRICS).write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    write_best(run, Best(1, 2.0))  # an evaluation ahead of the first checkpoint
    recipe = parse_recipe(raw(run))
    with pytest.raises(UsageError, match="not empty"):
        prepare(recipe)
    assert prepare(recipe, anew=True).start.how == "init"
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        prepare(recipe, anew=True)
    (run / "notes.txt").unlink()


def test_a_start_that_ended_ahead_of_its_first_tracker_is_gone_on_with(tmp_path: Path) -> None:
    run_here(raw(tmp_path / "run", train={"steps": 2}))
    (tmp_path / "run" / TRACKER).unlink()
    recipe = parse_recipe(raw(tmp_path / "run", train={"steps": 3}))
    with pytest.raises(UsageError, match="not empty"):
        prepare(recipe)
    assert prepare(recipe, anew=True).start.path == tmp_path / "run" / "iter_0000002"


def test_a_run_that_ends_within_its_first_checkpoint_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it were killed while the disk is waited for: nothing says that what lies there is whole."""
    recipe = raw(tmp_path / "run", train={"steps": 2})

    def killed(_: Path) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(complete, "sync", killed)
        run_here(recipe)
    assert list((tmp_path / "run").glob("iter_*"))
    assert prepare(parse_recipe(recipe), anew=True).start.how == "init"
    assert len(run_here(recipe, anew=True)) == 2
