"""Frozen weights on a GPU: held in FP8 alone they multiply as they did beside their bf16, in less memory."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mbx.models.megatron.core import frozen
from mbx.train.data.rows import micro_batches
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.loop import Outcome, train
from mbx.train.run.prepare import Prepared, prepare

pytestmark = pytest.mark.gpu
SMALL = ("model.init=random", "data.kind=pattern", "data.length=512", "train.micro_batch=1", "train.global_batch=2")
RATE = ("optim.lr=1e-4", "optim.warmup_steps=0")


def run(folder: Path, *overrides: str) -> tuple[Outcome, int]:
    """A short run's outcome and the most bytes it held."""
    gc.collect()  # what an earlier run left behind is not this one's
    recipe = load_recipe("qwen3_0_6b_lora", [*SMALL, *RATE, *overrides, f"run.dir={folder}"])
    outcome = train(prepare(recipe), live=False)
    return outcome, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("scaling", ["tensorwise", "blockwise"])
def test_casts_alone_multiply_as_beside_their_weight(scaling: str, recompute: str, tmp_path: Path) -> None:
    words = (f"fp8.recipe={scaling}", f"train.recompute={recompute}", "train.steps=4", "run.save=false")
    words += ("train.cuda_graph=off",)
    alone, less = run(tmp_path / "alone", *words)
    with patch.object(frozen, "keep_casts", lambda model, scaling: None):
        beside, more = run(tmp_path / "beside", *words)
    assert alone.losses == pytest.approx(beside.losses, abs=2e-3)
    assert alone.losses[0] == beside.losses[0]  # before sums of gradients can differ in their order
    assert more - less > 0.8 * 2 * 440e6  # the decoder's 440M weights in bf16


def test_delayed_scaling_has_weights_at_a_scale_of_their_own(tmp_path: Path) -> None:
    words = ("train.steps=6", "run.save=false")
    plain, _ = run(tmp_path / "bf16", *words)
    delayed, _ = run(tmp_path / "delayed", *words, "fp8.recipe=delayed")
    assert delayed.losses == pytest.approx(plain.losses, abs=0.05)


def test_a_run_with_casts_alone_is_saved_goes_on_and_is_exported(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    config = Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(base)

    def prepared(folder: str, steps: int, **arguments: object) -> Prepared:
        recipe = {
            "model": {"path": str(base)},
            "lora": {"rank": 8},
            "fp8": {"recipe": "tensorwise"},
            "data": {"kind": "pattern", "length": 128},
            "train": {"steps": steps, "micro_batch": 1, "global_batch": 2},
            "optim": {"lr": 1e-2, "schedule": "constant"},
            "run": {"dir": str(tmp_path / folder), "save_every": 3, "export_every": 3},
        }
        return prepare(parse_recipe(recipe), **arguments)  # type: ignore[arg-type]

    whole = prepared("whole", 6)
    losses = train(whole, live=False).losses
    first = train(prepared("parts", 3), live=False).losses
    assert first + train(prepared("parts", 6, resume=True), live=False).losses == losses

    # what was exported on the way is the run's adapter: with it PEFT has the next batch's loss, as the run had it
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert whole.train_rows is not None
    (batch,) = micro_batches(whole.train_rows, 3, global_batch=2, micro_batch=2, dp=1, dp_rank=0)
    ids, labels = (torch.stack([torch.as_tensor(getattr(row, key)) for row in batch]) for key in ("tokens", "labels"))
    apart = []
    for step in (3, 6):
        folder = tmp_path / "whole" / "export" / f"step_{step:07d}"
        tuned = PeftModel.from_pretrained(copy.deepcopy(network), folder)
        with torch.no_grad():
            logits = tuned(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        apart.append(abs(float(loss) - losses[3]))
    assert apart[0] < 0.02 < apart[1]  # FP8 and bf16 move the loss by less than three steps do


@pytest.mark.parametrize("width", [128, 4096])
def test_a_norm_whose_gamma_is_frozen_is_the_norm(width: int) -> None:
    x = torch.randn(64, 8, width, device="cuda", dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
    gamma, given = torch.randn(width, device="cuda", dtype=torch.bfloat16), torch.randn_like(x)
    y = frozen.rms_norm(x, gamma, 1e-6)
    (found,) = torch.autograd.grad(y, x, given)
    wide = x.detach().double().requires_grad_()
    expected = torch.nn.functional.rms_norm(wide, (width,), gamma.double(), 1e-6)
    (right,) = torch.autograd.grad(expected, wide, given.double())
    for got, want in ((y, expected), (found, right)):
        assert ((got.double() - want).norm() / want.norm()).item() < 4e-3
