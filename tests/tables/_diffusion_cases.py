"""Conversions of diffusion transformers, for the tests of tables and of folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.mcore.layout import Layout
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run


def imported(source: Path, target: Path, layout: Layout | None = None, **options: Any) -> Path:
    run(plan_hf_to_mcore(source, target, Options(sync=False, layout=layout or Layout(), **options)))
    return target


def exported(source: Path, target: Path, hf_config: Path | None = None, **options: Any) -> Path:
    run(plan_mcore_to_hf(source, target, Options(sync=False, **options), hf_config))
    return target
