"""An optimizer step that waits for the GPU once, and that a loss which is no number does not reach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import MegatronOptimizer


class GuardedStep:
    """Megatron Core's step, with the loss read after the gradient norm.

    Reading the loss before the step would drain the GPU's queue while nothing of the step is in it; the norm, which
    clipping has to know, is waited for anyway. Weights are written only after both are known, so a loss that is not
    finite leaves them as they were.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self.optimizer, self._write = optimizer, optimizer.step_with_ready_grads
        self._loss: torch.Tensor | None = None
        optimizer.step_with_ready_grads = self._write_if_finite
        for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
            _copy_at_once(inner)

    def __call__(self, loss: torch.Tensor) -> tuple[float, float, bool]:
        """Step; the loss, the gradient's norm, and whether weights were written (fp16 may have overflowed)."""
        self._loss = loss
        updated, norm, _ = self.optimizer.step()
        return float(loss), float(norm or 0.0), bool(updated)

    def _write_if_finite(self) -> bool:
        assert self._loss is not None
        return math.isfinite(float(self._loss)) and bool(self._write())


def _copy_at_once(optimizer: MegatronOptimizer) -> None:
    """Let an optimizer of fp32 copies write its weights in a few kernels instead of one a weight.

    Megatron Core copies one by one in bf16, because Apex had no kernel for it; an adapter of an 8B model is 352
    weights and its step 2 % of a short row's. Only for weights on a GPU, and only where the method is as in 0.16.
    """
    pairs = getattr(optimizer, "_get_model_and_main_params_data_float16", None)
    if (
        type(optimizer).__name__ != "Float16OptimizerWithFloat16Params"
        or pairs is None
        or not torch.cuda.is_available()
    ):
        return

    def copy() -> None:
        weights, copies = pairs()
        if weights:
            torch._foreach_copy_(weights, copies)

    optimizer._copy_main_params_to_model_params = copy
