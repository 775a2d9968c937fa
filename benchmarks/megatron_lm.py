"""Ten losses of `vanilla_gpt` beside Megatron-LM's own `pretrain_gpt.py`, step by step, on the GPUs of this machine.

    python -m benchmarks.megatron_lm --megatron-lm CHECKOUT [--out figures.jsonl]

CHECKOUT is a working copy of Megatron-LM at core_v0.16.1. Setting (a) needs one GPU, (b) two. Each runs with the
default dropout of 0.1 and without. What the losses agree on: initial weights, rows and their order, dropout masks,
optimizer and schedule. The largest difference is printed in units of the loss's bf16 spacing as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LOSS = re.compile(r"lm loss: ([0-9.E+-]+)")
_SECONDS = 180.0
#: Flags of both settings. The fused accumulation of gradients needs Apex, which either side goes without.
_COMMON = (
    "--bf16 --mock-data --tokenizer-type NullTokenizer --train-iters 10 --log-interval 1 --eval-iters 0 "
    "--eval-interval 1000 --seed 1234 --no-gradient-accumulation-fusion"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One comparison: Megatron-LM's flags and the recipe's overrides that mean the same."""

    name: str
    gpus: int
    flags: str
    overrides: str


SETTINGS = (
    Setting(
        "a: one GPU",
        1,
        "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 1024 --seq-length 512 "
        "--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 32 --lr 3e-4 --min-lr 3e-5 "
        "--vocab-size 32000",
        "",
    ),
    Setting(
        "b: TP 2, sequence parallel",
        2,
        "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 1024 --max-position-embeddings 1024 "
        "--micro-batch-size 2 --global-batch-size 16 --lr 1e-4 --vocab-size 1024 --tensor-model-parallel-size 2 "
        "--sequence-parallel",
        "parallel.tp=2 model.shape.num_layers=4 model.shape.model.vocab_size=1025 "
        "model.shape.model.max_sequence_length=1024 data.length=1024 train.micro_batch=2 train.global_batch=16 "
        "optim.lr=1e-4 optim.min_lr=0.0",
    ),
)


def torchrun(gpus: int, port: int, arguments: Sequence[str], folder: Path) -> str:
    """Output of a script on `gpus` processes; RuntimeError with its end where it fails."""
    env = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    command += ["--master-port", str(port), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])} failed\n{_reason(done.stdout + done.stderr)}")
    return done.stdout


def _reason(text: str) -> str:
    """Why a script failed: the end of its first rank's traceback, which stands before the launcher's own."""
    rank = [line for line in text.splitlines() if line.startswith("[rank0]")]
    return "\n".join(rank[-15:])[-3000:] if rank else text[-3000:]


def theirs(setting: Setting, dropout: float, checkout: Path, port: int) -> list[float]:
    """Losses of each step of `pretrain_gpt.py`.

    It prints running means, and does not begin a new one after the first line (`training_log`, `is_first_iteration`):
    its second line is the mean of steps 1 and 2, from which step 2 follows.
    """
    flags = [*_COMMON.split(), *setting.flags.split()]
    flags += ["--hidden-dropout", str(dropout), "--attention-dropout", str(dropout)]
    text = torchrun(setting.gpus, port, [str(checkout / "pretrain_gpt.py"), *flags], checkout)
    logged = [float(value) for value in _LOSS.findall(text)]
    return [logged[0], 2 * logged[1] - logged[0], *logged[2:]]


def ours(setting: Setting, dropout: float, port: int) -> list[float]:
    """Losses of the recipe's run."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        changes = [f"model.config.hidden_dropout={dropout}", f"model.config.attention_dropout={dropout}"]
        changes += [f"run.dir={run}", "run.save=false", *setting.overrides.split()]
        torchrun(setting.gpus, port, ["-m", "mbx", "train", "--recipe", "vanilla_gpt", *changes], ROOT)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


def main() -> None:
    """Run both sides of each setting that this machine has the GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", type=Path, required=True, help="working copy at core_v0.16.1")
    parser.add_argument("--out", type=Path, help="write every record here, as JSON lines")
    options = parser.parse_args()
    import torch

    records = []
    for number, setting in enumerate(s for s in SETTINGS if s.gpus <= torch.cuda.device_count()):
        for turn, dropout in enumerate((0.1, 0.0)):
            port = 29700 + 10 * number + 2 * turn
            a = ours(setting, dropout, port)
            b = theirs(setting, dropout, options.megatron_lm.resolve(), port + 1)
            gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
            spacing = 2.0 ** (math.floor(math.log2(max(b))) - 7)
            record = {"part": "megatron_lm", "setting": setting.name, "dropout": dropout, "ours": a, "theirs": b}
            records.append(record | {"difference": gap, "bf16_spacing": spacing})
            print(f"{setting.name}, dropout {dropout}: at most {gap:.2e} apart ({gap / spacing:.4f} bf16 steps)")
            for step, (x, y) in enumerate(zip(a, b, strict=True), 1):
                print(f"  {step:>2}  {x:.6f}  {y:.6f}")
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
