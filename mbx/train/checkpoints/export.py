"""A finished run as a Hugging Face folder or a PEFT adapter; no model is built."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UsageError
from mbx.formats import hf
from mbx.formats.adapter_folder import open_base
from mbx.run.adapters import plan_adapter_to_hf
from mbx.run.job import Options, plan_mcore_to_hf, run
from mbx.run.merge import plan_merge
from mbx.train.checkpoints.state import latest, read_recipe, read_state


def export_run(run_dir: Path, target: Path, *, merged: bool = False) -> tuple[Path, str]:
    """Write what a run trained, and say what it is: a model, a PEFT adapter, or (`merged`) the base with it.

    Weights keep their dtype, but for norms that Megatron Core stores as gamma and the folder as 1 + gamma (gated delta
    nets): those trained in 16 bits, which have no room for the sum, are written in fp32; rounding moves logits by
    tenths. An adapter is merged in fp32.
    """
    found = latest(run_dir)
    if found is None:
        raise UsageError(f"`{run_dir}` holds no checkpoint to export")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"`{target}` is not empty", hint="name a new folder")
    adapters = read_recipe(found).lora.rank > 0
    base = Path(read_state(found).base) if adapters and merged else None
    if base is not None and not (base / hf.CONFIG).is_file():
        raise UsageError(
            f"the adapters' base `{base}` is no Hugging Face folder to merge into",
            hint="export the adapter without ‹merged›, or convert the base first",
        )
    if not (found / "hf" / hf.CONFIG).is_file():
        raise UsageError(
            f"`{found}` was trained without a Hugging Face folder, whose names an export needs",
            hint=None if adapters else "mbx convert mcore-to-hf ‹hf-config› DIR",
        )
    if not adapters:
        job, kind = plan_mcore_to_hf(found, target, Options(exact_norms=True)), "Hugging Face model"
    elif base is not None:
        job, kind = plan_merge(base, found, target, Options()), "Hugging Face model, adapter merged in fp32"
    else:
        job, kind = plan_adapter_to_hf(found, target, Options(), open_base(found / "hf")), "PEFT adapter"
    return run(job).target, kind
