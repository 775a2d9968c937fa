"""A finished run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UsageError
from mbx.train.checkpoint import latest


def export_hf(run_dir: Path, target: Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Convert the run's last checkpoint to a Hugging Face folder at `target`; weights keep their dtype by default.

    For a run of adapters, use `mbx.train.lora.export_peft` or merge first: its checkpoint holds no base weights.
    """
    from mbx.convert import Options, plan_mcore_to_hf, run

    found = latest(run_dir)
    if found is None:
        raise UsageError(f"`{run_dir}` holds no checkpoint to export")
    if not (found / "hf").is_dir():
        raise UsageError(
            f"`{found}` was trained without a Hugging Face folder", hint="mbx convert mcore-to-hf --hf-config DIR"
        )
    return run(plan_mcore_to_hf(found, target, Options(dtype=dtype, overwrite=overwrite))).target
