"""Runs trainings in worlds of processes, one world after the other; a run that fails or hangs does not end the others.

Ranks of a world carry out a list of jobs, each in a process group of its own, so that Python and CUDA start once.
Worlds of one process share the GPUs out among themselves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "train"))

from tests.forks import meet  # noqa: E402

Raw: TypeAlias = dict[str, dict[str, object]]
Curves: TypeAlias = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: its recipe, whether it resumes, and the step after which it is told to stop (0: none).

    `mixed`: examples packed into a row see each other, which they must not.
    """

    name: str
    recipe: Raw
    resume: bool = False
    stop_at: int = 0
    mixed: bool = False


def run_jobs(jobs: list[Job], world: int, gpus: int, work: Path, limit_s: float) -> tuple[Curves, dict[str, str]]:
    """Losses of every job that ran, and why the others did not; `limit_s` is for one job."""
    lanes = max(1, gpus) if world == 1 else 1
    queues = [jobs[lane::lanes] for lane in range(lanes)]
    with ThreadPoolExecutor(lanes) as pool:
        parts = list(pool.map(lambda lane: _lane(queues[lane], world, lane, work, limit_s), range(lanes)))
    curves: Curves = {}
    failures: dict[str, str] = {}
    for found, failed in parts:
        curves |= found
        failures |= failed
    return curves, failures


def _lane(jobs: list[Job], world: int, lane: int, work: Path, limit_s: float) -> tuple[Curves, dict[str, str]]:
    """Jobs in order; after one that fails, the rest in new processes."""
    curves: Curves = {}
    failures: dict[str, str] = {}
    left = list(jobs)
    while left:
        results, errors = _start(left, world, lane, work, limit_s)
        curves |= results
        done = [job for job in left if job.name in results]
        left = left[len(done) :]
        if left:
            failures[left[0].name] = errors
            left = left[1:]
    return curves, failures


def _start(jobs: list[Job], world: int, lane: int, work: Path, limit_s: float) -> tuple[Curves, str]:
    """One set of processes: the results until the first failure, and that failure's words."""
    out = work / f"world{world}_{lane}_{time.monotonic_ns()}"
    out.mkdir()
    (out / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    processes = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
            "NVIDIA_TF32_OVERRIDE": "0",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
            "NCCL_NVLS_ENABLE": "0",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        if world == 1:
            env["CUDA_VISIBLE_DEVICES"] = str(lane)
        log = (out / f"log{rank}").open("wb")
        processes.append(subprocess.Popen([sys.executable, __file__, str(out)], env=env, stdout=log, stderr=log))
    results = out / "results.jsonl"
    seen, since = 0, time.monotonic()
    hung = False
    while any(process.poll() is None for process in processes):
        count = len(results.read_text().splitlines()) if results.is_file() else 0
        if count != seen:
            seen, since = count, time.monotonic()
        hung = time.monotonic() - since > limit_s + (60 if seen == 0 else 0)
        if hung or any(process.poll() for process in processes):
            time.sleep(2)  # the other ranks say what they met
            for process in processes:
                process.kill()
        time.sleep(0.2)
    curves: Curves = {}
    for line in results.read_text().splitlines() if results.is_file() else []:
        record = json.loads(line)
        curves[record["name"]] = record["losses"]
    errors = [path.read_text() for path in sorted(out.glob("error*"))]
    log = (out / "log0").read_text(errors="replace")
    return curves, errors[0] if errors else f"{'did not end in time' if hung else 'ended'}: …{log[-1500:]}"


def main(out: Path) -> None:
    """One rank of a world."""
    import torch

    from mbx.train.data.rows import Examples
    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run.log import Step
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    jobs = json.loads((out / "jobs.json").read_text())
    for number, job in enumerate(jobs):
        store = meet(int(rank), out / f"port{number}")

        def watch(step: Step, stop_at: int = job["stop_at"]) -> None:
            if stop_at == step.step:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            prepared = prepare(parse_recipe(job["recipe"]), resume=job["resume"])
            if job["mixed"]:
                assert isinstance(prepared.train_rows, Examples)
                prepared = replace(prepared, train_rows=replace(prepared.train_rows, packed=False))
            done = train(prepared, live=False, on_step=watch)
        except BaseException as error:  # torch's CheckpointException is one
            (out / f"error{rank}").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}")
            raise
        del store
        if rank == "0":
            with (out / "results.jsonl").open("a") as file:
                file.write(json.dumps({"name": job["name"], "losses": done.losses}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
