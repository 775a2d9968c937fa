"""The step that nobody waits for is Megatron Core's: the same norm, clipping and weights; fp16 keeps its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _trainings import raw

from mbx.train.model.parallel import session
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.log import Log
from mbx.train.run.loop import Trainer
from mbx.train.run.prepare import prepare
from mbx.train.run.stepping import Stepper


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """A trainer of the tiny Qwen3 whose gradients of one batch are whole."""
    prepared = prepare(parse_recipe(raw(tmp_path / "run")))
    with session(prepared.recipe, prepared.ranks):
        log = Log(prepared.recipe, main=True, live=False)
        made = Trainer(prepared, log)
        for chunk in made.chunks:
            chunk.zero_grad_buffer()
        made.batches.run(made.train_rows, 0, 8, forward_only=False)
        yield made
        log.close()


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_the_step_is_that_of_megatron_core(trainer: Trainer, clip: float) -> None:
    optimizer, weights = trainer.optimizer, list(trainer.chunks[0].parameters())
    for part in (optimizer, *getattr(optimizer, "chained_optimizers", [])):
        part.config.clip_grad = clip
    began = [w.detach().clone() for w in weights]
    grads, state = [w.main_grad.clone() for w in weights], copy.deepcopy(optimizer.state_dict())

    cleared: list[torch.Tensor] = []
    _, norm, updated = Stepper(optimizer)(torch.tensor(1.0), lambda: cleared.append(weights[0].detach().clone()))
    assert torch.equal(cleared[0], weights[0])  # what is queued behind the step finds the weights that it made
    stepped = [w.detach().clone() for w in weights]
    for weight, value, grad in zip(weights, began, grads, strict=True):
        weight.data.copy_(value)
        weight.main_grad.copy_(grad)
    optimizer.load_state_dict(state)
    _, expected, _ = optimizer.step()

    assert updated and norm > 0.05
    assert norm == pytest.approx(expected, rel=1e-6) if clip else True  # without clipping it counts none
    for ours, weight, value in zip(stepped, weights, began, strict=True):
        torch.testing.assert_close(ours, weight.detach(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(ours, value)


def test_a_loss_that_is_no_number_is_told(trainer: Trainer) -> None:
    assert math.isnan(Stepper(trainer.optimizer)(torch.tensor(math.nan))[0])


class Float16OptimizerWithFloat16Params:
    """The methods of Megatron Core's optimizer of this name that a step under a loss scale goes through."""

    grad_scaler = object()

    def __init__(self, updated: bool = True) -> None:
        self.weights = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)]
        self.copies = [torch.full((3,), 1 / 3), torch.full((2, 2), -2 / 3)]
        self.calls: list[str] = []
        self.updated = updated

    def _get_model_and_main_params_data_float16(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.weights, self.copies

    def _copy_main_params_to_model_params(self) -> None:
        self.calls.append("one by one")
        for weight, master in zip(self.weights, self.copies, strict=True):
            weight.copy_(master)

    def step(self) -> tuple[bool, float | None, None]:
        if self.updated:
            self._copy_main_params_to_model_params()
        return self.updated, 2.5 if self.updated else None, None


def test_the_fast_copy_rounds_as_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Float16OptimizerWithFloat16Params(), Float16OptimizerWithFloat16Params()
    given: Any = torch.tensor(1.0)
    Stepper(slow)(given)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Stepper(fast)(given)  # type: ignore[arg-type]
    assert "one by one" in slow.calls and "one by one" not in fast.calls
    for ours, theirs in zip(fast.weights, slow.weights, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_an_overflow_is_no_update() -> None:
    assert Stepper(Float16OptimizerWithFloat16Params(False))(torch.tensor(3.0)) == (3.0, 0.0, False)  # type: ignore
