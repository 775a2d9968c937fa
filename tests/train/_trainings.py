"""Runs small trainings: in this process, or as a world of gloo processes that carry out a list of jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.forks import Fork, meet, start

ROOT = Path(__file__).resolve().parent.parent.parent
QWEN3 = ROOT / "fixtures" / "tiny" / "qwen3"
#: Loss curves are compared at fp32, over this many steps.
STEPS = 20

Raw = dict[str, dict[str, object]]


def raw(run_dir: Path, **sections: dict[str, object]) -> Raw:
    """A recipe for the tiny Qwen3 on counting rows, with `sections` laid over it."""
    base: Raw = {
        "model": {"path": str(QWEN3)},
        "data": {"kind": "pattern", "length": 32},
        "train": {"steps": STEPS, "micro_batch": 2, "global_batch": 8, "precision": "fp32"},
        "optim": {"lr": 3e-3},
        "run": {"dir": str(run_dir), "device": "cpu"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


def run_here(recipe: Raw, **arguments: object) -> list[float]:
    """Losses of a run in this process. A signal that ended the run was meant for the tests, so it ends them."""
    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    done = train(prepare(parse_recipe(recipe), **arguments), live=False)  # type: ignore[arg-type]
    for number in (signal.SIGTERM, signal.SIGINT):
        if number.name in done.stopped:
            signal.raise_signal(number)
    return list(done.losses)


def start_world(
    size: int,
    jobs: list[dict[str, object]],
    out: Path,
    *,
    own_group: bool = False,
    python: str = sys.executable,
) -> list[Fork | subprocess.Popen[bytes]]:
    """Start `size` processes of `python` that run `jobs` one after the other; rank 0 writes their losses to `out`.

    `own_group`: each leads a process group, by which what it forked can be found.
    """
    out.with_suffix(".jobs").write_text(json.dumps(jobs))
    for old in out.parent.glob(f"{out.stem}.port*"):  # of an earlier world
        old.unlink()
    return [
        start(
            rank,
            Path(__file__),
            out,
            log=out.with_suffix(f".log{rank}"),
            own_group=own_group,
            python=python,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            PYTHONPATH=str(ROOT),
        )
        for rank in range(size)
    ]


def run_to_its_kill(job: dict[str, object], out: Path) -> None:
    """Run one process until it kills itself, and see that the writers that it had started end with it."""
    (killed,) = start_world(1, [job], out, own_group=True)
    try:
        assert killed.wait(timeout=120) == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(killed.pid, 0)
                time.sleep(0.1)
            os.killpg(killed.pid, signal.SIGKILL)
            raise AssertionError("a writer outlives its rank")


def run_world(
    size: int, jobs: list[dict[str, object]], out: Path, *, python: str = sys.executable
) -> list[list[float]]:
    """Losses of every job, run by `size` processes of `python`."""
    processes = start_world(size, jobs, out, python=python)
    deadline = time.monotonic() + 600
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() for process in processes)
        if failed or time.monotonic() > deadline:  # the others wait for the one that failed
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.wait() for process in processes]
    logs = "\n".join(out.with_suffix(f".log{rank}").read_text()[-3000:] for rank in range(size))
    assert codes == [0] * size, logs
    return json.loads(out.read_text())


def stall_writers() -> None:
    """Let every process forked from now on hang where it would flush a file to the disk."""
    parent, flush = os.getpid(), os.fsync

    def stalled(fd: int) -> None:
        if os.getpid() != parent:
            time.sleep(600)
        flush(fd)

    os.fsync = stalled


def slow_down(seconds: float) -> Any:
    """What lets every forward pass of a model take longer, once it is started."""
    from megatron.core.models.gpt import GPTModel

    plain = GPTModel.forward

    def forward(*args: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return plain(*args, **named)

    return patch.object(GPTModel, "forward", forward)


def main(out: Path) -> None:
    """One process of a world.

    A job is `{recipe, resume?, kill_at?, stop_at?, signal?, stall_from?, faults?, verify?, logits?, hooks?, delta?,
    mamba?, slow?, beside?}`. `slow`: [rank, step, seconds]: from this step on, a forward pass of the rank takes
    longer. `beside`: a folder of packages that are not in the environment.

    `delta`: gated delta nets train, as `delta_on_cpu` has them, in all jobs; `mamba`: mixers, as `mamba_on_cpu` has
    them. `verify`: the recipe's training is compared rather than run; its result is the legs. `stall_from`: the
    writers of asynchronous checkpoints hang from this step on. `faults`: by step, the rank and the place that cannot
    be written then. `logits`: the folder to which the recipe's teacher is written rather than learned from; its result
    is the rows and the learned tokens.
    """
    import torch

    torch.set_num_threads(1)
    jobs = json.loads(out.with_suffix(".jobs").read_text())
    with contextlib.ExitStack() as lent:
        if any(job.get("delta") for job in jobs):
            from tests.delta_on_cpu import delta_on_cpu

            lent.enter_context(delta_on_cpu())
        if any(job.get("mamba") for job in jobs):
            from tests.mamba_on_cpu import mamba_on_cpu

            lent.enter_context(mamba_on_cpu())
        carry_out(jobs, out)


def carry_out(jobs: list[dict[str, Any]], out: Path) -> None:
    """Jobs of `main`, one after the other."""
    from _faults import Planted

    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run.hooks import NO_HOOKS, load_hooks
    from mbx.train.run.log import Step
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    results, planted = [], Planted()
    for number, job in enumerate(jobs):
        store = meet(int(os.environ["RANK"]), out.with_suffix(f".port{number}"))

        if folder := job.get("beside"):
            sys.path.append(folder)

        def watch(step: Step, job: dict[str, Any] = job) -> None:
            rank, last, seconds = job.get("slow", (-1, -1, 0.0))
            if rank == int(os.environ["RANK"]) and step.step == last - 1:
                slow_down(seconds).start()
            if job.get("stall_from") == step.step:
                stall_writers()
            rank, place = job.get("faults", {}).get(str(step.step), (-1, None))
            planted.plant(place if rank == int(os.environ["RANK"]) else None)
            if job.get("kill_at") == step.step:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.get("stop_at") == step.step:
                os.kill(os.getpid(), job.get("signal", signal.SIGTERM))

        if job.get("verify"):
            from mbx.train.proof.training import verify_training

            report = verify_training(parse_recipe(job["recipe"]))
            results.append([] if report is None else [[leg.name, leg.status, *leg.details] for leg in report.legs])
            del store
            continue
        if target := job.get("logits"):
            from mbx.train.run.logits import prepared_for, write_logits

            facts = write_logits(prepared_for(parse_recipe(job["recipe"]), Path(target)), Path(target))
            results.append([facts.rows, facts.learned])
            del store
            continue
        own = load_hooks(Path(job["hooks"])) if job.get("hooks") else NO_HOOKS
        prepared = prepare(parse_recipe(job["recipe"]), resume=job.get("resume", False), hooks=own)
        results.append(list(train(prepared, live=False, on_step=watch).losses))
        patch.stopall()
        del store
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
