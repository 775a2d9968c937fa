"""The guarded step: a loss that is no number writes no weights, and the fast copy writes what the slow one would."""

from __future__ import annotations

import math

import pytest
import torch

from mbx.train.run.stepping import GuardedStep


class Float16OptimizerWithFloat16Params:
    """The methods of Megatron Core's optimizer of this name that a step goes through, in their order."""

    def __init__(self) -> None:
        self.weights = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)]
        self.copies = [torch.full((3,), 1 / 3), torch.full((2, 2), -2 / 3)]
        self.calls: list[str] = []

    def _get_model_and_main_params_data_float16(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.weights, self.copies

    def _copy_main_params_to_model_params(self) -> None:
        self.calls.append("one by one")
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.copy_(copy)

    def step_with_ready_grads(self) -> bool:
        self.calls.append("write")
        self._copy_main_params_to_model_params()
        return True

    def step(self) -> tuple[bool, float, None]:
        self.calls.append("norm")
        return self.step_with_ready_grads(), 2.5, None


@pytest.mark.parametrize("loss", [1.25, math.nan, math.inf])
def test_weights_are_written_for_a_finite_loss_only(loss: float) -> None:
    optimizer = Float16OptimizerWithFloat16Params()
    seen, norm, updated = GuardedStep(optimizer)(torch.tensor(loss))  # type: ignore[arg-type]
    assert norm == 2.5 and updated is math.isfinite(loss)
    assert seen == loss or math.isnan(seen) and math.isnan(loss)
    assert ("write" in optimizer.calls) is math.isfinite(loss)
    assert bool(optimizer.weights[0].any()) is math.isfinite(loss)


def test_the_fast_copy_rounds_as_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Float16OptimizerWithFloat16Params(), Float16OptimizerWithFloat16Params()
    GuardedStep(slow)(torch.tensor(1.0))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    GuardedStep(fast)(torch.tensor(1.0))  # type: ignore[arg-type]
    assert "one by one" in slow.calls and "one by one" not in fast.calls
    for ours, theirs in zip(fast.weights, slow.weights, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_an_overflow_is_no_update() -> None:
    class Overflowing(Float16OptimizerWithFloat16Params):
        def step(self) -> tuple[bool, None, None]:  # type: ignore[override]
            return False, None, None

    assert GuardedStep(Overflowing())(torch.tensor(3.0)) == (3.0, 0.0, False)  # type: ignore[arg-type]
