"""A run starts from a HybridModel's checkpoint as from the GPTModel's of the same weights."""

from __future__ import annotations

from pathlib import Path

from _trainings import QWEN3, raw, run_here

from mbx.run.job import Options, plan_hf_to_mcore, run


def test_both_forms_start_alike(tmp_path: Path) -> None:
    losses = []
    for form in ("gpt", "hybrid"):
        run(plan_hf_to_mcore(QWEN3, tmp_path / form, Options(sync=False, model_class=form)))
        recipe = raw(tmp_path / f"run_{form}", train={"steps": 2, "micro_batch": 2, "global_batch": 2})
        losses.append(run_here(recipe, init_from=tmp_path / form))
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
