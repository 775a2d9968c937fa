"""A finished run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UsageError
from mbx.train.run_state import latest, read_recipe, read_state


def export_hf(run_dir: Path, target: Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Convert the run's last checkpoint to a Hugging Face folder at `target`; weights keep their dtype by default.

    Norms that Megatron Core stores as gamma and the folder as 1 + gamma (gated delta nets) are then written in fp32
    where they were trained in 16 bits, which have no room for the sum: rounding it moves logits by tenths.
    For a run of adapters, use `peft_folder.export_peft` or merge first: its checkpoint holds no base weights.
    """
    from mbx.run.job import Options, plan_mcore_to_hf, run

    found = latest(run_dir)
    if found is None:
        raise UsageError(f"`{run_dir}` holds no checkpoint to export")
    if not (found / "hf").is_dir():
        raise UsageError(
            f"`{found}` was trained without a Hugging Face folder", hint="mbx convert mcore-to-hf ‹hf-config› DIR"
        )
    return run(plan_mcore_to_hf(found, target, Options(dtype=dtype, exact_norms=True, overwrite=overwrite))).target


def export_run(run_dir: Path, target: Path, *, merged: bool = False) -> tuple[Path, str]:
    """Write what a run trained, and say what it is: a model, a PEFT adapter, or (`merged`) the base with it."""
    from mbx.train.lora.peft_folder import export_peft, merge_run

    found = latest(run_dir)
    if found is None:
        raise UsageError(f"`{run_dir}` holds no checkpoint to export")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"`{target}` is not empty", hint="name a new folder")
    if not read_recipe(found).lora.rank:
        return export_hf(run_dir, target), "Hugging Face model"
    if not merged:
        return export_peft(run_dir, target), "PEFT adapter"
    base = Path(read_state(found).base)
    if not (base / "config.json").is_file():
        raise UsageError(
            f"the adapters' base `{base}` is no Hugging Face folder to merge into",
            hint="export the adapter without ‹merged›, or convert the base first",
        )
    return merge_run(run_dir, base, target), "Hugging Face model, adapter merged in fp32"
