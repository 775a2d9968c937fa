"""Linears with a step behind their product, which comes behind an adapter's product as well.

Like `family_layers` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import nn

#: What follows a product `[..., out]`, whose bias has been added.
Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def follow(linear: nn.Module, step: Step) -> None:
    """Let `step` come behind the product of a built `linear`; adapters call `product` and `behind` apart."""
    kind: Any = type(linear)
    linear.__class__ = _followed(kind)
    linear.__dict__["step"] = step


@cache
def _followed(linear: type[nn.Module]) -> type[nn.Module]:
    class FollowedLinear(linear):  # type: ignore[misc, valid-type]  # the base is Megatron Core's own choice
        step: Step

        def forward(self, *arguments: Any) -> tuple[torch.Tensor, None]:
            """x: [..., in] → [..., out]"""
            return self.behind(*self.product(*arguments))

        def product(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            """The linear alone, with the bias that it leaves to others."""
            output, bias = super().forward(*arguments)
            return output, bias

        def behind(self, output: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, None]:
            """What follows the product, an adapter's as well."""
            return self.step(output if bias is None else output + bias), None

    return FollowedLinear
