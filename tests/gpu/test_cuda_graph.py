"""A recorded run is the run: the same losses with several micro-batches a step, in bf16 and FP8, with adapters or not.

What is recorded runs the same kernels on the same numbers; sums of gradients over a linear's tiles may be added in
another order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mbx.train.model.graphs import why_not
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare

pytestmark = pytest.mark.gpu
SMALL = (
    "model.init=random",
    "data.kind=pattern",
    "data.length=512",
    "run.save=false",
    "train.steps=8",
    "optim.lr=1e-4",
)
MICRO = ("train.micro_batch=1", "train.global_batch=4")
CASES = {
    "adapters": ("qwen3_0_6b_lora", ()),
    "weights": ("qwen3_0_6b_sft", ()),
    "mean_of_means": ("qwen3_0_6b_sft", ("train.per_token_loss=false",)),
    "fp8": ("qwen3_0_6b_lora", ("fp8.recipe=tensorwise",)),
    "fp8_weights": ("qwen3_0_6b_sft", ("fp8.recipe=tensorwise",)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_run(case: str, tmp_path: Path) -> None:
    name, own = CASES[case]
    losses = []
    for word in ("auto", "off"):
        overrides = [*SMALL, *MICRO, *own, f"train.cuda_graph={word}", f"run.dir={tmp_path / word}"]
        prepared = prepare(load_recipe(name, overrides))
        assert (why_not(prepared.recipe, prepared.plan.config, prepared.ranks) is None) == (word == "auto")
        losses.append(train(prepared, live=False).losses)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02
    assert losses[0][-1] < losses[0][0]
