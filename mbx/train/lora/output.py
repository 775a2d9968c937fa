"""The adapter of the output layer."""

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


class LoraOutput(LoraLinear):
    """A frozen output layer and its adapter. `lora_a`: [r, hidden]; `lora_b`: [padded vocabulary, r], cut by rows.

    `weight` is the layer's own or the embedding's, which Megatron Core hands to a tied one at every call. Rows of
    padding stay zero in B, behind those of the `vocabulary`: an exported adapter has none of them.
    """

    may_join = False  # cross entropy makes the gradient of logits in their place

    def __init__(
        self,
        base: nn.Module,
        lora: Lora,
        slots: Slots,
        config: TransformerConfig,
        seed: int,
        weight: torch.Tensor,
        vocabulary: int,
    ) -> None:
        self._shared = (weight,)  # in a tuple: a parameter of the embedding is not to become this module's as well
        super().__init__(base, lora, slots, config, seed)
        self.rows = min(max(vocabulary - self.group.rank() * slots.rows, 0), slots.rows)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the product."""
        return self._shared[0]

    def forward(
        self, x: torch.Tensor, *arguments: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's logits, [..., vocabulary / tp], with the adapter's added."""
        logits, bias = self.base(x, *arguments, **named)
        h = self._between(F.linear(self._drop(x), self._a(self.lora_a)))
        b = F.pad(self._joined()[: self.rows], (0, 0, 0, self.slots.rows - self.rows))
        out = torch.addmm(logits.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=self.scale)
        return out.view(logits.shape), bias
