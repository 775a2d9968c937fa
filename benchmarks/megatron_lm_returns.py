"""Checkpoints of mbx through Megatron-LM's own `pretrain_gpt.py`: loaded, a step at learning rate 0, saved, and back.

    python -m benchmarks.megatron_lm_returns --megatron-lm CHECKOUT [--only GLOB] [--jobs N] [--out records.jsonl]

CHECKOUT is a working copy of Megatron-LM at a release's tag; both sides run with the Megatron Core in it. Each case is
a tiny family, a format and a tensor-parallel size. It passes where what Megatron-LM saved, converted back, is the
folder's tensors bit for bit, and `verify parity` finds config and weights equal. TP 2 takes two GPUs; any number of
cases share them. `--flags` are added to every run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock

from benchmarks.megatron_lm import torchrun

_ALONE = Lock()  # libraries are imported where they are needed, which two threads cannot do at once
_LOSS = re.compile(r"lm loss: ([0-9.E+-]+)")
#: Flags of every run. Learning rate 0 makes the step a copy to fp32 and back, which loses nothing of bf16.
_COMMON = (
    "--use-checkpoint-args --exit-on-missing-checkpoint --finetune --no-load-optim --no-load-rng --save-interval 1 "
    "--bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 251 --seq-length 64 --train-iters 1 --lr 0 "
    "--min-lr 0 --micro-batch-size 1 --global-batch-size 2 --log-interval 1 --eval-iters 0 --eval-interval 1000 "
    "--num-workers 0 --no-gradient-accumulation-fusion --attention-backend unfused"
)
_EXPERTS = "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
#: What `--use-checkpoint-args` takes over in neither release, by tiny family.
FLAGS = {
    "llama": "--norm-epsilon 1e-5 --use-rope-scaling --rope-scaling-factor 8",
    "qwen2": "--norm-epsilon 1e-6",
    "qwen3_moe": f"--norm-epsilon 1e-6 --qk-layernorm {_EXPERTS}",
    "deepseek_v3": f"--norm-epsilon 1e-6 --qk-layernorm {_EXPERTS} --multi-latent-attention --q-lora-rank 24 "
    "--kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --rotary-scaling-factor 40 --mscale 1.0 "
    "--mscale-all-dim 1.0 --mtp-num-layers 1 --moe-router-num-groups 4 --moe-router-group-topk 2 "
    "--moe-router-bias-update-rate 0 --moe-router-dtype fp32",
}
#: A padding that Megatron-LM makes itself. A legacy file has one rank's rows, and must have them padded so already.
_DIVISOR = {"torch_dist": 1, "torch": 128}


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny family's checkpoint, as it is written and as Megatron-LM loads and saves it."""

    family: str
    format: str
    tp: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.format}-tp{self.tp}"

    @property
    def flags(self) -> str:
        """Megatron-LM's flags of this case alone."""
        sequence = " --sequence-parallel" if self.tp > 1 and _EXPERTS in FLAGS[self.family] else ""
        sizes = f" --tensor-model-parallel-size {self.tp} --ckpt-format {self.format}"
        return FLAGS[self.family] + sizes + sequence


CASES = tuple(Case(family, kind, tp) for family in FLAGS for kind in _DIVISOR for tp in (1, 2))


def passes(case: Case, checkout: Path, extra: Sequence[str], port: int, folder: Path) -> dict[str, object]:
    """One case's record; RuntimeError where Megatron-LM fails."""
    from converters.mcore.layout import Layout
    from fixtures.make_tiny import make
    from mbx.installed import core_version
    from mbx.proof.parity import parity
    from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

    source, ours, theirs, back = (folder / name for name in ("hf", "ours", "theirs", "back"))
    layout = Layout(tp=case.tp, vocab_divisor=_DIVISOR[case.format])
    with _ALONE:
        make(case.family, source)
        run(plan_hf_to_mcore(source, ours, Options(sync=False, layout=layout, format=case.format, model_class="gpt")))
    flags = [*_COMMON.split(), *case.flags.split(), "--load", str(ours), "--save", str(theirs), *extra]
    begun = time.monotonic()
    text = torchrun(case.tp, port, [str(checkout / "pretrain_gpt.py"), *flags], checkout)
    seconds = time.monotonic() - begun
    with _ALONE:
        run(plan_mcore_to_hf(theirs, back, Options(sync=False), hf_config=source))
        report = parity(source, theirs, hf_config=source)
    legs = {leg.name: leg.status for leg in report.legs}
    faults = [line for leg in report.legs if leg.status == "failed" for line in leg.details]
    wanted, found = stored(source), stored(back)
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    record = {"part": "megatron_lm_returns", "megatron_lm": core_version(), "family": case.family}
    record |= {
        "format": case.format,
        "tp": case.tp,
        "loss": float(_LOSS.findall(text)[-1]),
        "seconds": round(seconds, 1),
    }
    return record | {"tensors": len(wanted), "differ": differ, "legs": legs, "faults": faults}


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a folder: dtype, shape and bytes."""
    from safetensors import deserialize

    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in deserialize(file.read_bytes()):
            found[name] = (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
    return found


def main() -> int:
    """Run the cases, print a line each, and return 1 where one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", type=Path, required=True, help="working copy at a release's tag")
    parser.add_argument("--only", default="*", help="cases by their names, as FAMILY-FORMAT-tpN")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--port", type=int, default=29800, help="the first of as many ports as there are cases")
    parser.add_argument("--flags", default="", help="more flags of Megatron-LM, for every case")
    parser.add_argument("--out", type=Path, help="write every record here, as JSON lines")
    options = parser.parse_args()
    checkout = options.megatron_lm.resolve()
    sys.path.insert(0, str(checkout))  # the release whose names the legacy format has is that of the checkout
    cases = [case for case in CASES if fnmatch(case.name, options.only)]

    def attempt(number: int) -> dict[str, object]:
        case = cases[number]
        with tempfile.TemporaryDirectory() as name:
            try:
                return passes(case, checkout, options.flags.split(), options.port + number, Path(name))
            except Exception as error:  # every case is reported, whatever became of the others
                return {"case": case.name, "error": f"{type(error).__name__}: {error}"}

    with ThreadPoolExecutor(options.jobs) as pool:
        records = list(pool.map(attempt, range(len(cases))))
    failed = 0
    for case, record in zip(cases, records, strict=True):
        legs = record.get("legs", {})
        good = not record.get("error") and not record["differ"] and legs["config"] == legs["weights"] == "passed"
        failed += not good
        print(f"{case.name:<30} {'equal' if good else 'FAILED'}  {record.pop('error', None) or json.dumps(record)}")
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(cases) - failed} of {len(cases)} came back bit for bit")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
