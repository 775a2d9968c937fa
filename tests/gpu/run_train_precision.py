"""Precisions on one GPU: `python tests/gpu/run_train_precision.py --work DIR --out DIR`.

A small random model learns the same counting rows in fp32, bf16, fp16 and under each FP8 recipe. Every loss must fall,
stay near that of bf16, and (FP8) not be that of bf16: weights that are cast once and kept would stall the fall. MXFP8
must be refused by name on a GPU older than Blackwell. A run that is stopped half way and resumed must have the very
losses of one that is not: what scales FP8 has gone through is in the checkpoint. DIR gets `train_precision.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from _worlds import Curves, Job, Raw, run_jobs  # noqa: E402

STEPS = 40
#: The loss of each precision must fall at least so far, and end within so much of bf16's.
FALL, NEAR = 1.0, 0.15
FP8 = ("delayed", "tensorwise", "blockwise", "mxfp8")
PRECISIONS = ("fp32", "bf16", "fp16", *(f"fp8 {kind}" for kind in FP8))
SHAPE = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 64,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "init_method_std": 0.02,
    "model.vocab_size": 512,
    "model.max_sequence_length": 512,
    "model.position_embedding_type": "rope",
    "model.share_embeddings_and_output_weights": False,
}


def recipe(name: str, work: Path, device: str, precision: str, fp8: str = "none", *, save: bool = False) -> Raw:
    """The small model under one precision."""
    return {
        "model": {"init": "random", "shape": SHAPE},
        "data": {"kind": "pattern", "length": 128},
        "train": {"steps": STEPS, "micro_batch": 2, "global_batch": 8, "precision": precision},
        "optim": {"lr": 3e-3},
        "fp8": {"recipe": fp8},
        "run": {"dir": str(work / name.replace(" ", "")), "device": device, "save": save},
    }


def judge(curves: Curves, failures: dict[str, str]) -> list[dict[str, object]]:
    """One row a precision: first and last loss, distance of the last from bf16's, and whether that is right."""
    rows: list[dict[str, object]] = []
    bf16 = curves.get("bf16", [])
    for name in PRECISIONS:
        if name not in curves:
            why = failures.get(name, "was not run")
            refused = name == "fp8 mxfp8" and "DeviceError: fp8.recipe=mxfp8 needs compute capability" in why
            rows.append({"run": name, "ok": refused, "refused" if refused else "reason": why.splitlines()[0][:400]})
            continue
        curve = curves[name]
        fell, apart = curve[0] - curve[-1], abs(curve[-1] - bf16[-1]) if bf16 else float("nan")
        ok = fell > FALL and apart < NEAR and (not name.startswith("fp8") or curve != bf16)
        rows.append({"run": name, "ok": ok, "first": curve[0], "last": curve[-1], "from_bf16": apart})
        parts = curves.get(f"{name} stopped", []) + curves.get(f"{name} resumed", [])
        resumed = f"{name} resumed"
        if len(parts) != len(curve):
            rows.append({"run": resumed, "ok": False, "reason": failures.get(resumed, f"{len(parts)} steps")[:400]})
            continue
        off = max(abs(a - b) for a, b in zip(parts, curve, strict=True))
        rows.append({"run": resumed, "ok": off == 0, "first": parts[0], "last": parts[-1], "from_whole": off})
    return rows


def jobs_of(name: str, work: Path, device: str) -> list[Job]:
    """A precision's run, and the same stopped half way and resumed."""
    fp8 = name.removeprefix("fp8 ") if name.startswith("fp8 ") else "none"
    precision = "bf16" if fp8 != "none" else name
    whole = Job(name, recipe(name, work, device, precision, fp8))
    if fp8 == "mxfp8":
        return [whole]
    saved = recipe(f"{name} saved", work, device, precision, fp8, save=True)
    return [whole, Job(f"{name} stopped", saved, stop_at=STEPS // 2), Job(f"{name} resumed", saved, resume=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for train_precision.json")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    arguments = parser.parse_args()
    work, device = arguments.work, arguments.device
    for folder in (work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for name in PRECISIONS for job in jobs_of(name, work, device)]
    curves, failures = run_jobs(jobs, 1, arguments.gpus, work, 90.0)
    rows = judge(curves, failures)
    document = {"rows": rows, "curves": curves, "failures": failures}
    (arguments.out / "train_precision.json").write_text(json.dumps(document, indent=1))
    for row in rows:
        verdict = "ok" if row["ok"] else "FAILED"
        figures = (
            f"{row['first']:.4f} → {row['last']:.4f}" if "first" in row else row.get("refused", row.get("reason"))
        )
        sys.stdout.write(f"{row['run']!s:16} {verdict:8} {figures}\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
