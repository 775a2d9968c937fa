"""Measures one model that sees or hears: its tiny checkpoint, both libraries over the same tower and drawn pictures.

A process of its own, started by `run_forward.py` through `_alone.py`. Names are model types of `fixtures/wrapped.py`,
and `+tower`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from _alone import Found, report  # noqa: E402
from _verdict import TOLERANCE, judge  # noqa: E402

if TYPE_CHECKING:
    from mbx.proof.legs import Leg

#: Behind a model type, as some text models have the same.
WITH_TOWER = "+tower"


def measure(name: str, device: str, tiny: Path | None, work: Path, found: Found) -> None:
    """Every leg as `mbx verify parity --forward` has it, and against a checkpoint with two rows exchanged."""
    from fixtures.wrapped import make_wrapped
    from mbx.models.transformers.reference import without_kernels
    from mbx.run.job import Options, plan_hf_to_mcore, run
    from mbx.tables import shipped

    with without_kernels():  # a class that is imported with them keeps them
        source = make_wrapped(name.removesuffix(WITH_TOWER), work / "hf")
    if name.startswith("qwen3_5"):
        _condition(source / "config.json")
    job = plan_hf_to_mcore(source, work / "mcore", Options(sync=False))
    table = job.plan.table
    found.update(table=table.name, sha256=shipped(table.name).digest)  # of the file, of which a plan may take a part
    run(job)
    legs = _legs(source, work / "mcore", device)
    found.update(
        {leg: {"status": legs[leg].status, "summary": legs[leg].summary} for leg in ("cover", "config", "weights")}
    )
    forward = legs["forward"]
    if table.unsupported or not forward.figures:
        found["reason"] = table.unsupported or " ".join([forward.summary, *forward.details[:2]])
        return
    if not any(line.startswith("reached") and "pictures" in line for line in forward.details):
        found["notes"] = ["Compared on text alone"]
    found[f"against_transformers_on_{device}"] = _figures(forward)
    row = _exchange_rows(source)
    run(plan_hf_to_mcore(source, work / "exchanged", Options(sync=False)))
    _exchange_rows(source)  # and back
    found["control"] = {"row": row, **_figures(_legs(source, work / "exchanged", device)["forward"])}
    judge(found, device)


def _legs(source: Path, checkpoint: Path, device: str) -> dict[str, Leg]:
    from mbx.models.device import Spread
    from mbx.proof.parity import parity

    return {leg.name: leg for leg in parity(source, checkpoint, forward=True, spread=Spread(device=device)).legs}


def _figures(leg: Leg) -> Found:
    figures = dict(leg.figures)
    return {
        "max_abs": figures["max_abs"],
        "mean_kl_nats": max(figures["mean_kl_nats"], 0.0),
        "top1_agreement": figures["top1_agreement"],
        "num_positions": figures["positions"],
        "limit": TOLERANCE,
        "ok": figures["max_abs"] <= TOLERANCE,
    }


def _condition(file: Path) -> None:
    """A larger epsilon: a drawn delta net's output is next to nothing here and there, where its norm would make the
    rounding of either library the figure."""
    config = json.loads(file.read_text("utf-8"))
    config["text_config"]["rms_norm_eps"] = 0.1
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _exchange_rows(folder: Path) -> str:
    """Exchange the first two rows of a weight of the text model's first layer in a folder; the weight's name."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    first = sorted(name for name in tensors if "layers.0." in name)  # a text model's come before its tower's
    kinds = ("gate_proj.weight", "q_proj.weight", "in_proj.weight")
    name = next(name for kind in kinds for name in first if name.endswith(kind))
    tensors[name][[0, 1]] = tensors[name][[1, 0]]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


if __name__ == "__main__":
    report(measure)
