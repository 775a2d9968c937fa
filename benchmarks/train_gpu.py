"""Training on GPUs, measured: throughput beside a bare Megatron Core loop, LoRA beside PEFT, the budget, FP8.

    python benchmarks/train_gpu.py                             every part, on one GPU or two
    python benchmarks/train_gpu.py throughput lora             some parts
    python benchmarks/train_gpu.py budget --only method=lora --only length=8192
    python benchmarks/train_gpu.py --list

Prints one JSON record a measurement as it comes, and tables at the end. Weights are random: speed and memory do not
depend on them. Each group of measurements is a process of its own; with two GPUs, two groups run side by side. What is
compared runs in turns, `--rounds` times. `python -m benchmarks.megatron_lm` compares losses with Megatron-LM's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.train_peers import (  # noqa: E402
    ACCUMULATE,
    GIB,
    LORA_SHAPES,
    MEASURED,
    WARM,
    Record,
    bare_run,
    peft_runs,
)

MARK = "RECORD "
SHAPES: dict[str, dict[str, int | bool]] = {
    "llama32_1b_pretrain": dict(layers=16, hidden=2048, ffn=8192, heads=32, tied=True, length=4096, micro=2),
    # 24 of its 32 layers: with fp32 gradients, weights and momentum and the FP8 copies, all would fill the GPU
    "llama3_8b_pretrain": dict(layers=24, hidden=4096, ffn=14336, heads=32, tied=False, length=4096, micro=1),
}


@dataclass(frozen=True, slots=True)
class Session:
    """What a group of measurements is given: a scratch folder, rounds, and the records that are wanted."""

    folder: Path
    rounds: int
    only: Mapping[str, str]

    @property
    def tp(self) -> int:
        """Tensor parallelism: every GPU of the group."""
        return int(os.environ["WORLD_SIZE"])

    def measure(self, run: Callable[[], Record], **labels: object) -> None:
        """Run and print a record, unless `--only` leaves it out."""
        if all(str(labels.get(key)).lower() == value.lower() for key, value in self.only.items()):
            print(MARK + json.dumps({**labels, **run()}), flush=True)


def mbx_run(name: str, overrides: Sequence[str], folder: Path, steps: int = WARM + MEASURED) -> Record:
    """Median tokens/s behind the warm-up, peak memory, losses, and the budget's prediction, of one short run.

    `peak_gib` leaves out what earlier runs of this process left behind, but for the workspaces this run uses again.
    """
    import torch

    from mbx.train.budget.predict import WORKSPACES, predict
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    if "MASTER_PORT" in os.environ:  # a rendezvous of its own for each run
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    gc.collect()
    torch.cuda.empty_cache()
    left = max(0, torch.cuda.memory_allocated() - WORKSPACES) / GIB
    run = f"run.dir={folder / str(time.monotonic_ns())}"
    recipe = load_recipe(name, ["model.init=random", "run.save=false", run, f"train.steps={steps}", *overrides])
    prepared = prepare(recipe)
    seen = []
    outcome = train(prepared, live=False, on_step=seen.append)
    budget = predict(recipe, prepared.plan, prepared.ranks.dp)
    return {
        "tokens_per_s": statistics.median(step.tokens_per_s for step in seen[WARM:] or seen),
        "tflops": statistics.median(step.tflops for step in seen[WARM:] or seen),
        "peak_gib": seen[-1].memory_gib - left,
        "left_before_gib": left,
        "predicted_gib": budget.total / GIB,
        "phase": budget.phase,
        "parts_gib": {part: value / GIB for part, value in budget.parts.items()},
        "losses": [round(loss, 5) for loss in outcome.losses],
    }


def plain(length: int, micro: int, rounds: int = 1) -> list[str]:
    """Overrides of a short run on a fixed pattern: micro-batches of `micro` rows, `rounds` of them a step."""
    batch = [f"train.micro_batch={micro}", f"train.global_batch={micro * rounds}"]
    return ["data.kind=pattern", f"data.length={length}", *batch, "train.eval_every=0", "optim.warmup_steps=0"]


def throughput_overrides(model: str, fp8: str) -> list[str]:
    """A full-parameter run with SGD, whose state leaves room for 8B weights on one GPU."""
    shape = SHAPES[model]
    layers = f"model.shape.num_layers={shape['layers']}"
    batch = plain(int(shape["length"]), int(shape["micro"]), ACCUMULATE)
    return [*batch, "optim.optimizer=sgd", layers, f"fp8.recipe={fp8}"]


def lora_overrides(micro: int, length: int, recompute: bool, tp: int) -> list[str]:
    """PEFT's run: rank 64 on all linears."""
    more = [
        "lora.rank=64",
        "lora.alpha=128",
        f"parallel.tp={tp}",
        f"train.recompute={'full' if recompute else 'none'}",
    ]
    return [*plain(length, micro), *more]


def budget_cases(tp: int) -> list[tuple[str, dict[str, object], list[str]]]:
    """Recipe, labels and overrides of each run that is predicted: a grid on the 1B shape, then odd ones at tp 1."""
    cases: list[tuple[str, dict[str, object], list[str]]] = []
    for method in ("pretrain", "lora"):
        for fp8 in ("none", "tensorwise"):
            for recompute in ("none", "full"):
                for length in (2048, 8192):
                    labels: dict[str, object] = {"model": "llama32_1b", "method": method, "fp8": fp8}
                    labels |= {"recompute": recompute, "length": length, "other": ""}
                    changes = [f"parallel.tp={tp}", f"train.recompute={recompute}", f"fp8.recipe={fp8}"]
                    cases.append((f"llama32_1b_{method}", labels, [*plain(length, 1), *changes]))
    odd = (
        ("llama32_1b", "pretrain", "delayed", "none", 4096, ["train.micro_batch=2", "train.global_batch=4"]),
        ("llama32_1b", "pretrain", "blockwise", "full", 4096, []),
        ("llama32_1b", "lora", "delayed", "none", 4096, []),
        ("llama32_1b", "lora", "blockwise", "none", 4096, []),
        ("llama32_1b", "lora", "none", "none", 4096, ["lora.targets=linear_qkv,linear_proj"]),
        ("llama32_1b", "dora", "none", "none", 4096, []),
        ("llama32_1b", "dora", "none", "full", 4096, []),
        ("llama32_1b", "pretrain", "none", "selective", 4096, []),
        ("llama32_1b", "pretrain", "none", "none", 2048, ["train.precision=fp16"]),
        ("qwen3_0_6b", "pretrain", "none", "none", 4096, ["train.micro_batch=4", "train.global_batch=4"]),
        ("qwen3_0_6b", "lora", "tensorwise", "none", 8192, []),
        ("qwen3_0_6b", "sft", "none", "full", 8192, []),
    )
    for model, method, fp8, recompute, length, more in odd if tp == 1 else ():
        labels = {"model": model, "method": method, "fp8": fp8, "recompute": recompute, "length": length}
        changes = [*plain(length, 1), f"train.recompute={recompute}", f"fp8.recipe={fp8}", *more]
        cases.append((f"{model}_{method}", labels | {"other": " ".join(more)}, changes))
    return cases


# --- the groups ---


def throughput(session: Session) -> None:
    """mbx beside the bare loop, in turns, in one process: Llama 1B and 8B shapes, bf16 and FP8."""
    for model, shape in SHAPES.items():
        for fp8 in ("none", "tensorwise", *(("delayed", "blockwise") if "8b" in model else ())):
            labels = {"part": "throughput", "model": model, "fp8": fp8}
            both = fp8 in ("none", "tensorwise")
            for _ in range(session.rounds if both and "1b" in model else 1):
                changes = throughput_overrides(model, fp8)
                session.measure(lambda c=changes, m=model: mbx_run(m, c, session.folder), side="mbx", **labels)
                if both:
                    session.measure(lambda s=shape, q=fp8: bare_run(**s, fp8=q), side="bare", **labels)


def lora(session: Session) -> None:
    """mbx at PEFT's shapes, and PEFT after it where one GPU is used."""
    for _ in range(session.rounds if session.tp == 1 else 1):
        for recompute in (False, True):
            for micro, length in LORA_SHAPES:
                labels = {"recompute": recompute, "micro": micro, "length": length, "tp": session.tp}
                changes = lora_overrides(micro, length, recompute, session.tp)
                run = lambda c=changes: mbx_run("llama3_8b_lora", c, session.folder)  # noqa: E731
                session.measure(run, part="lora", side="mbx", **labels)
        if session.tp == 1 and session.only.get("side") != "mbx":
            for record in peft_runs():
                session.measure(lambda: {}, part="lora", side="peft", tp=1, **record)
            gc.collect()


def budget(session: Session) -> None:
    """Predicted beside measured memory at this tp."""
    for name, labels, overrides in budget_cases(session.tp):
        run = lambda n=name, o=overrides: mbx_run(n, o, session.folder, steps=4)  # noqa: E731
        session.measure(run, part="budget", tp=session.tp, **labels)


def updates(session: Session) -> None:
    """Losses on a learnable sequence in bf16 and under each FP8 recipe: they must fall alike."""
    for fp8 in ("none", "tensorwise", "delayed", "blockwise"):
        more = ["optim.warmup_steps=2", "model.shape.num_layers=2", f"fp8.recipe={fp8}"]
        changes = [*plain(1024, 4, 2), *more]
        run = lambda c=changes: mbx_run("llama32_1b_pretrain", c, session.folder, steps=30)  # noqa: E731
        session.measure(run, part="updates", fp8=fp8)


GROUPS = {"throughput": throughput, "lora": lora, "budget": budget, "updates": updates}
#: What runs on one GPU, every second group on either of two; and what runs on both with tensor parallelism.
ONE, BOTH = ("lora", "throughput", "updates", "budget"), ("budget", "lora")


# --- the parent ---


def spawn(groups: list[str], gpus: list[int], port: int, folder: Path, more: list[str]) -> list[subprocess.Popen[str]]:
    """Processes, one a GPU, that run `groups` one after the other."""
    started = []
    for rank in range(len(gpus)):
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(gpus)),
            "PYTHONWARNINGS": "ignore",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        if len(gpus) > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        log = (folder / f"{'-'.join(groups)}-{len(gpus)}.{rank}.err").open("w")
        arguments = [sys.executable, __file__, "--group", ",".join(groups), "--folder", str(folder), *more]
        started.append(subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=log, text=True))
    return started


def collect(worlds: list[list[subprocess.Popen[str]]], records: list[Record], deadline: float) -> None:
    """Wait for every process; rank 0's records are printed and kept. A failed process ends its world."""
    import threading

    def read(process: subprocess.Popen[str], keep: bool) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK) and keep:
                records.append(json.loads(line[len(MARK) :]))
                print(line[len(MARK) :].rstrip(), flush=True)

    threads = [
        threading.Thread(target=read, args=(process, rank == 0), daemon=True)
        for world in worlds
        for rank, process in enumerate(world)
    ]
    for thread in threads:
        thread.start()
    while any(process.poll() is None for world in worlds for process in world):
        for world in worlds:
            if any(process.poll() for process in world) or time.monotonic() > deadline:
                for process in world:
                    process.kill()
        time.sleep(0.5)
    for thread in threads:
        thread.join()


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUE", help="records with this label")
    parser.add_argument("--rounds", type=int, default=2, help="turns of what is compared")
    parser.add_argument("--out", type=Path, help="write every record here, as JSON lines")
    parser.add_argument("--seconds", type=float, default=460.0, help="stop what still runs after this time")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(GROUPS))
        return
    if options.group:
        import transformer_engine.pytorch  # noqa: F401  # before the first CUDA call

        session = Session(options.folder, options.rounds, dict(pair.split("=", 1) for pair in options.only))
        for group in options.group.split(","):
            GROUPS[group](session)
        return
    import torch

    from benchmarks import figures

    parts = options.parts or list(GROUPS)
    more = ["--rounds", str(options.rounds), *(word for pair in options.only for word in ("--only", pair))]
    deadline, records = time.monotonic() + options.seconds, []
    with tempfile.TemporaryDirectory() as name:
        folder, gpus = Path(name), torch.cuda.device_count()
        one = [group for group in ONE if group in parts]
        halves = [one[0::2], one[1::2]] if gpus > 1 else [one]
        collect([spawn(half, [n], 0, folder, more) for n, half in enumerate(halves) if half], records, deadline)
        both = [group for group in BOTH if group in parts]
        if gpus > 1 and both:
            collect([spawn(both, [0, 1], 29600, folder, more)], records, deadline)
        for log in sorted(folder.glob("*.err")):
            text = log.read_text()
            if "Error" in text:
                print(f"--- {log.name}\n{text[-2500:]}")
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print("\n".join(figures.training(records)))


if __name__ == "__main__":
    main()
