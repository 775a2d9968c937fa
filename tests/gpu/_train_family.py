"""Trains one family's tiny checkpoint, exports it and compares logits of the two sides.

A process of its own, started by `run_train_families.py` through `_alone.py`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from _alone import Found, report  # noqa: E402
from _family import checkpoint, forward  # noqa: E402  # also sets the switches of cuBLAS and of the kernels

STEPS = 10
#: Gated delta nets have kernels in 16 bits only.
BF16 = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def measure(name: str, device: str, tiny: Path | None, work: Path, found: Found) -> None:
    """Everything about one family."""
    from mbx.train.checkpoints.export import export_run
    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run import prepare as prepare_module
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    source = checkpoint(name, tiny, work)
    bf16 = device == "cuda" and name in BF16
    if device == "cuda" and name.startswith("nemotron"):
        from _mamba_reference import stand_in

        if find_spec("mamba_ssm") is None:
            stand_in()
            found["notes"] = ["Kernels of mamba-ssm replaced by their recurrence in torch"]
            prepare_module.check_kernels = lambda config: None  # type: ignore[attr-defined]
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
    forward(name, device, exported, work, config, found)
    if found["status"] == "passed" and not losses[-1] < losses[0]:
        found.update(status="failed", reason=f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    report(measure)
