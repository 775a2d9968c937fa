"""Trains one family's tiny checkpoint, exports it and compares logits of the two sides.

`python tests/gpu/_train_family.py NAME DEVICE TINY RESULT`: a process of its own, so that no failure reaches another.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from _family import Found, _checkpoint, _forward  # noqa: E402  # also sets the switches of cuBLAS and of the kernels

from converters.errors import MbxError  # noqa: E402

STEPS = 10
#: Gated delta nets have kernels in 16 bits only.
BF16 = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def measure(name: str, device: str, tiny: Path | None, work: Path) -> Found:
    """Everything about one family; what fails is a `reason` beside what was found before it."""
    found: Found = {"status": "not run"}
    started = time.monotonic()
    try:
        if device == "cuda":
            import transformer_engine.pytorch  # noqa: F401  # before any CUDA op
        _measure(name, device, tiny, work, found)
    except MbxError as error:
        found["reason"] = " ".join([error.fact, *error.details[:3]]).replace(str(work), "…")[:400]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is one
        found["status"] = "failed"
        found["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace(str(work), "…")
        found["traceback"] = traceback.format_exc()[-3000:]
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def _measure(name: str, device: str, tiny: Path | None, work: Path, found: Found) -> None:
    from mbx.train.export import export_run
    from mbx.train.loop import train
    from mbx.train.prepare import prepare
    from mbx.train.recipe import parse_recipe

    source = _checkpoint(name, tiny, work)
    bf16 = device == "cuda" and name in BF16
    if device == "cuda" and name.startswith("nemotron"):
        from _mamba_reference import stand_in

        if stand_in():
            found["notes"] = ["Kernels of mamba-ssm replaced by their recurrence in torch"]
    raw: dict[str, object] = {
        "model": {"path": str(source), "vocab_divisor": 64},
        "data": {"kind": "pattern", "length": 64},
        "train": {"steps": STEPS, "micro_batch": 2, "global_batch": 8, "precision": "bf16" if bf16 else "fp32"},
        "optim": {"lr": 3e-3},
        "run": {"dir": str(work / "mcore"), "device": device},
    }
    prepared = prepare(parse_recipe(raw))
    losses = train(prepared, live=False).losses
    found.update(first_loss=losses[0], last_loss=losses[-1], trained_in="bf16" if bf16 else "fp32")
    exported, _ = export_run(work / "mcore", work / "exported")
    config = dict(prepared.plan.config)
    if config.get("experimental_attention_variant") == "gated_delta_net":
        config["deterministic_mode"] = True  # Megatron Core's own torch code; the kernels take no fp32
    _forward(name, device, exported, work, config, found)
    if found["status"] == "passed" and not losses[-1] < losses[0]:
        found.update(status="failed", reason=f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    name, device, tiny, result = sys.argv[1:5]
    with tempfile.TemporaryDirectory() as work:
        found = measure(name, device, Path(tiny) if tiny else None, Path(work))
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
