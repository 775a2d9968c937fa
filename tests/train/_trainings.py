"""Runs small trainings: in this process, or as a world of gloo processes that carry out a list of jobs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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
    """Losses of a run in this process."""
    from mbx.train.loop import train
    from mbx.train.prepare import prepare
    from mbx.train.recipe import parse_recipe

    return list(train(prepare(parse_recipe(recipe), **arguments), live=False).losses)  # type: ignore[arg-type]


def start_world(size: int, jobs: list[dict[str, object]], out: Path) -> list[subprocess.Popen[bytes]]:
    """Start `size` processes that run `jobs` one after the other; rank 0 writes their losses to `out`."""
    probes = [socket.socket() for _ in jobs]  # a port of its own for each job's rendezvous
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    out.with_suffix(".jobs").write_text(
        json.dumps([{**job, "port": port} for job, port in zip(jobs, ports, strict=True)])
    )
    processes = []
    for rank in range(size):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        log = out.with_suffix(f".log{rank}").open("wb")
        arguments = [sys.executable, __file__, str(out)]
        processes.append(subprocess.Popen(arguments, env=env, stdout=log, stderr=log, cwd=ROOT))
    return processes


def run_world(size: int, jobs: list[dict[str, object]], out: Path) -> list[list[float]]:
    """Losses of every job, run by `size` processes."""
    processes = start_world(size, jobs, out)
    deadline = time.monotonic() + 300
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


def main(out: Path) -> None:
    """One process of a world. A job is `{recipe, resume?, kill_at?, stop_at?}`."""
    import torch

    torch.set_num_threads(1)
    from mbx.train.log import Step
    from mbx.train.loop import train
    from mbx.train.prepare import prepare
    from mbx.train.recipe import parse_recipe

    results = []
    for job in json.loads(out.with_suffix(".jobs").read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])

        def watch(step: Step, job: dict[str, int] = job) -> None:
            if job.get("kill_at") == step.step:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.get("stop_at") == step.step:
                os.kill(os.getpid(), signal.SIGTERM)

        prepared = prepare(parse_recipe(job["recipe"]), resume=job.get("resume", False))
        results.append(list(train(prepared, live=False, on_step=watch).losses))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
