"""Every shipped recipe on a GPU: `python benchmarks/recipes_gpu.py --out FILE.jsonl`.

    python benchmarks/recipes_gpu.py                              ten steps of every recipe on one GPU
    python benchmarks/recipes_gpu.py --only 'qwen35_*' --peft     some, each beside Transformers with PEFT
    python benchmarks/recipes_gpu.py --gpus 2                     with tensor or expert parallelism over two
    python benchmarks/recipes_gpu.py --draw 7 20                  20 random settings from seed 7
    python benchmarks/recipes_gpu.py --set lora.rank=64 --set parallel.tp=2 --gpus 2 --only qwen35_9b_lora
    python benchmarks/recipes_gpu.py --runs FILE --of 2           the runs that FILE lists, on a machine of two GPUs
    python benchmarks/recipes_gpu.py --memory 60 --together 2     two runs share a GPU, for their memory
    python benchmarks/recipes_gpu.py --list

A line of FILE: the run's GPUs, its recipe, overrides, and `peft` at the end for Transformers with PEFT.
Weights are random. A model that does not fit loses layers from its end until the budget says that it does; the line
says how many are left. One line a run as it ends, and a JSON record a run at the end of FILE. A few processes import
everything ahead of their run and wait for it; a run that hangs is killed after `--run-s` seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# torch then counts GPUs without starting CUDA, which no fork survives
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

from benchmarks.recipe_runs import GIB, Record, Spec, drawn, run_peft, run_recipe  # noqa: E402


@dataclass(slots=True)
class Running:
    """Processes of one run, the GPUs that they hold, and the file that rank 0 writes its record to."""

    spec: Spec
    processes: list[multiprocessing.process.BaseProcess]
    devices: list[int]
    answer: Path
    until: float
    began: float


@dataclass(slots=True)
class Spare:
    """A process that imports everything and waits to be told its run."""

    process: multiprocessing.process.BaseProcess
    told: Connection


def spare(start: str, options: argparse.Namespace) -> Spare:
    """Begin one."""
    context = multiprocessing.get_context(start)
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(heard, options), daemon=True)
    process.start()
    heard.close()
    return Spare(process, told)


def child(heard: Connection, options: argparse.Namespace) -> None:
    """One process of a run: it leaves a record, or why there is none."""
    warm(options.device)
    spec, rank, devices, port, answer = heard.recv()
    world = len(devices)
    # the imports may have started CUDA, so every device stays visible and the run takes its own by number
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(devices[rank]), "WORLD_SIZE": str(world)}
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = answer.with_suffix(f".log{rank}").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        if options.device == "cuda":
            import torch

            torch.cuda.set_device(devices[rank])
        run = run_peft if spec.peft else run_recipe
        own = f"run.dir={answer.with_suffix('')}"  # runs of one recipe do not share a folder
        found = run(
            replace(spec, overrides=(*spec.overrides, own)),
            options.steps,
            options.memory * GIB,
            options.device,
            options.length,
        )
    except BaseException as error:  # whatever it was, it is this run's record
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:600]}
    if rank == 0 or "error" in found:
        draft = answer.with_suffix(f".draft{rank}")
        draft.write_text(json.dumps(found))
        draft.replace(answer)
    sys.stdout.flush()
    os._exit(1 if "error" in found else 0)


def start(spec: Spec, options: argparse.Namespace, spares: list[Spare], devices: list[int], answer: Path) -> Running:
    """Tell as many spare processes as the run has GPUs, and begin others in their place."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    taken = [spares.pop(0) for _ in devices]
    for rank, one in enumerate(taken):
        one.told.send((spec, rank, devices, port, answer))
        one.told.close()
    spares += [spare(options.start, options) for _ in devices]
    now = time.monotonic()
    return Running(spec, [one.process for one in taken], devices, answer, now + options.run_s, now)


def settled(run: Running, deadline: float) -> Record | None:
    """A run's record once it has ended; None while it goes on. A run over its time, or with a dead rank, is killed."""
    alive = [process for process in run.processes if process.is_alive()]
    failed = any(process.exitcode for process in run.processes)
    late = time.monotonic() > min(run.until, deadline)
    if alive and not failed and not late:
        return None
    for process in alive:
        process.kill()
    for process in run.processes:
        process.join()
    if run.answer.is_file():
        return dict(json.loads(run.answer.read_text()))
    codes = [process.exitcode for process in run.processes]
    why = f"killed after {time.monotonic() - run.began:.0f} s" if late else f"exit codes {codes}, no record"
    log = run.answer.with_suffix(".log0")
    tail = log.read_text(errors="replace")[-400:] if log.is_file() else ""
    return {"error": f"{why}; {tail}"}


def line(spec: Spec, found: Record) -> str:
    """A run in one line."""
    if "error" in found:
        return f"FAILED  {spec.label}: {' '.join(str(found['error']).split())}"
    losses = found["losses"]
    assert isinstance(losses, list)
    peak, ratio = found["peak_gib"], found.get("predicted_over_measured")
    cut = "" if found["layers"] == found["of_layers"] else f" ({found['layers']} of {found['of_layers']} layers)"
    memory = "" if peak is None else f"  peak {peak:.2f} GiB"
    if isinstance(ratio, float):
        memory += f"  predicted {found['predicted_gib']:.2f} ({ratio - 1:+.1%})"
    state = "ok    " if found["finite"] else "NOT FINITE"
    batch = f"{found['micro_batch']} x {found['length']}"
    return (
        f"{state}  {spec.label}{cut}  {batch}  loss {losses[0]:.3f} → {losses[-1]:.3f}"
        f"  {found['tokens_per_s']:,.0f} tok/s{memory}  first step {found['first_step_s']} s"
    )


def choose(options: argparse.Namespace) -> list[Spec]:
    """The runs that the command line asks for."""
    from mbx.train.recipe.catalogue import load_recipe, recipe_names

    if options.runs:
        lines = [line.split() for line in options.runs.read_text().splitlines() if line and not line.startswith("#")]
        return [
            Spec(recipe, tuple(word for word in rest if word != "peft"), int(gpus), "peft" in rest)
            for gpus, recipe, *rest in lines
        ]
    names = [name for name in recipe_names() if fnmatch.fnmatch(name, options.only)]
    names = [name for name in names if load_recipe(name).model.shape]
    specs = drawn(names, *options.draw) if options.draw else [Spec(name) for name in names]
    made = []
    for spec in specs:
        changed = (*spec.overrides, *options.set)
        made.append(Spec(spec.recipe, changed, options.gpus))
        if options.peft and load_recipe(spec.recipe).lora.rank:
            made.append(Spec(spec.recipe, changed, 1, peft=True))
    return made


def warm(device: str) -> str:
    """Import everything that runs need; how to start processes: `fork`, unless an import has started CUDA."""
    import torch

    if device == "cuda":
        import transformer_engine.pytorch  # noqa: F401  # before the first CUDA call
    import mbx.models.megatron.build
    import mbx.models.megatron.core.layers
    import mbx.models.megatron.core.training
    import mbx.train.run.loop
    import mbx.train.run.prepare  # noqa: F401

    return "spawn" if torch.cuda.is_initialized() else "fork"


def work(specs: list[Spec], options: argparse.Namespace, out: TextIO | None) -> int:
    """Run everything, as many at once as GPUs are free; the number of runs that failed."""
    deadline = time.monotonic() + 60 * options.minutes
    free = options.together * list(range(options.of))
    waiting, running, failures = list(specs), list[Running](), 0
    spares = [spare(options.start, options) for _ in range(2 * len(free))]
    with tempfile.TemporaryDirectory() as name:
        number = 0
        while waiting or running:
            while waiting and len(free) >= waiting[0].gpus and time.monotonic() < deadline:
                spec = waiting.pop(0)
                devices = [free.pop(0) for _ in range(spec.gpus)]
                running.append(start(spec, options, spares, devices, Path(name) / f"{number}.json"))
                number += 1
            if time.monotonic() >= deadline and waiting:
                sys.stdout.write(f"out of time: {len(waiting)} runs were not started, {waiting[0].label} first\n")
                failures, waiting = failures + len(waiting), []
            for run in list(running):
                if (found := settled(run, deadline)) is None:
                    continue
                running.remove(run)
                free += run.devices
                failures += "error" in found or not found["finite"]
                sys.stdout.write(line(run.spec, found) + "\n")
                sys.stdout.flush()
                if out is not None:
                    took = round(time.monotonic() - run.began, 1)
                    out.write(json.dumps({**asdict(run.spec), "whole_s": took, **found}) + "\n")
                    out.flush()
            time.sleep(0.05)
    for one in spares:
        one.process.kill()
    return failures


def main() -> int:
    """Run what the command line names; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="recipes by name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override for every run")
    parser.add_argument("--draw", nargs=2, type=int, metavar=("SEED", "N"), help="N random settings from a seed")
    parser.add_argument("--peft", action="store_true", help="also Transformers with PEFT at the same shapes")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a run")
    parser.add_argument("--of", type=int, help="GPUs of the machine, that runs share; as many as a run's by default")
    parser.add_argument("--together", type=int, default=1, help="runs of one GPU that share one; --memory is of each")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="a run a line, instead of recipes by name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=0, help="tokens of a row, whatever the recipes say")
    parser.add_argument("--memory", type=float, default=120.0, metavar="GIB", help="of a GPU, that a budget may fill")
    parser.add_argument("--run-s", type=float, default=240.0, help="seconds of one run")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all runs together")
    parser.add_argument("--out", type=Path, help="append a JSON record a run here")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--list", action="store_true", help="print the runs and start none")
    options = parser.parse_args()
    options.of = options.of or options.gpus
    specs = choose(options)
    if options.together > 1 and any(spec.gpus > 1 for spec in specs):
        parser.error("runs of several GPUs share none: --together 1")
    if options.list or not specs:
        sys.stdout.write("".join(spec.label + "\n" for spec in specs))
        return 0 if specs else 2
    began = time.monotonic()
    options.start = warm(options.device)
    sys.stdout.write(f"imports took {time.monotonic() - began:.1f} s, runs are started by {options.start}\n")
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(options.out.open("a")) if options.out else None
        return 1 if work(specs, options, out) else 0


if __name__ == "__main__":
    sys.exit(main())
