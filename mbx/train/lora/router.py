"""The adapter of a router: what it adds to the experts' scores, in the precision in which those are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mbx.train.lora.adapter import Slots
from mbx.train.lora.layer import LoraLinear
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig


class LoraRouter(LoraLinear):
    """A frozen `TopKRouter` and its adapter, whole on every rank: `lora_a`: [r, hidden], `lora_b`: [experts, r].

    The product lies in the middle of the router's forward pass, so its own method is replaced on the module.
    """

    def __init__(self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seed: int) -> None:
        super().__init__(base, lora, slots, config, seed)
        base.gating = self._scores  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, *arguments: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and the map of tokens to experts."""
        found: tuple[torch.Tensor, torch.Tensor] = self.base(x, *arguments, **named)
        return found

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the experts, [..., experts]; x: [..., hidden]."""
        scores: torch.Tensor = type(self.base).gating(self.base, x)  # type: ignore[attr-defined]
        h = F.linear(self._drop(x).to(scores.dtype), self._a(self.lora_a).to(scores.dtype))
        return scores + self.scale * F.linear(h, self._joined().to(scores.dtype))
