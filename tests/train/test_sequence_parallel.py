"""Ranks of tensor parallelism that share the tokens out step as one process does (gloo, two processes).

Of experts that are not cut each rank holds all, and sees its own tokens: what it holds whole is summed over the ranks,
and a loss that is one for a row weighs as the row does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from _trainings import Raw, raw, run_here, run_world

from fixtures.make_tiny import make

TOLERANCE = 1e-4
STEPS = 4
LORA = {"rank": 4, "alpha": 8.0, "targets": "all-linear"}
BALANCED = {"moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01}
CASES: dict[str, tuple[str, dict[str, object], dict[str, dict[str, object]]]] = {
    "dense": ("qwen3", {}, {}),
    "dense_lora": ("qwen3", {}, {"lora": LORA}),
    "layer_norms": ("nemotron", {}, {}),
    "experts": ("qwen3_moe", BALANCED, {}),
    "experts_cut": ("qwen3_moe", BALANCED, {"parallel": {"etp": 2}}),
    "sequences": ("qwen3_moe", {**BALANCED, "moe_router_load_balancing_type": "seq_aux_loss"}, {}),
    "experts_lora": ("qwen3_moe", BALANCED, {"lora": LORA}),
    "experts_cut_lora": ("qwen3_moe", BALANCED, {"lora": LORA, "parallel": {"etp": 2}}),
}
FAST = ("dense_lora", "experts", "experts_cut_lora")


def recipe(folder: Path, case: str, tp: int) -> Raw:
    family, config, sections = CASES[case]
    axes = {"tp": tp, **(sections.get("parallel", {}) if tp > 1 else {})}
    model = {"path": str(make(family, folder / f"{case}{tp}")), "vocab_divisor": 256 // tp, "config": config}
    train = {"steps": STEPS, "micro_batch": 1, "global_batch": 2}
    return raw(folder / f"run-{case}-{tp}", **{**sections, "model": model, "parallel": axes, "train": train})


def step_alike(folder: Path, cases: Sequence[str]) -> None:
    jobs: list[dict[str, object]] = [{"recipe": recipe(folder, case, 2)} for case in cases]
    for case, shared in zip(cases, run_world(2, jobs, folder / "losses.json"), strict=True):
        alone = run_here(recipe(folder, case, 1))
        apart = max(abs(a - b) for a, b in zip(shared, alone, strict=True))
        assert apart < TOLERANCE, f"{case}: {apart:.1e}"
        assert abs(alone[-1] - alone[0]) > 10 * TOLERANCE  # a run that trains nothing would agree as well


def test_two_ranks_step_as_one(tmp_path: Path) -> None:
    step_alike(tmp_path, FAST)


@pytest.mark.slow
def test_two_ranks_step_as_one_further(tmp_path: Path) -> None:
    step_alike(tmp_path, [case for case in CASES if case not in FAST])
