"""Gated MLPs whose halves are bounded (Step-3.5): silu(gate) from above, the other half from both sides.

Megatron Core's own bound is for the gate before its activation. Like `family_layers` this file imports torch and
megatron when imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mbx.models.megatron.config import FlatConfig
from mbx.models.megatron.followed import follow


def clamp_halves(layers: Iterable[Any], config: FlatConfig) -> None:
    """Bound the gated halves of routed experts by `swiglu_limits`, of all other MLPs by `swiglu_limits_shared`.

    Each is a number for each layer of the model, 0 for none (Transformers' `Step3p7MLP` and `Step3p7Experts`).
    """
    limits = {True: config.get("swiglu_limits"), False: config.get("swiglu_limits_shared")}
    for layer in layers if any(limits.values()) else ():
        for name, linear in layer.mlp.named_modules():
            path = name.split(".")
            bounds = limits["experts" in path]
            bound = bounds[layer.layer_number - 1] if path[-1] == "linear_fc1" and isinstance(bounds, list) else None
            if bound:
                follow(linear, Bound(bound))


@dataclass(frozen=True, slots=True)
class Bound:
    """Bounds what comes out of a linear, a gate above another half: [..., 2 · width]."""

    bound: float

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        gate, up = output.chunk(2, dim=-1)
        return torch.cat((gate.clamp(max=_before_silu(self.bound)), up.clamp(-self.bound, self.bound)), -1)


@cache
def _before_silu(bound: float) -> float:
    """The number whose silu is `bound`, which is positive: there silu grows."""
    found = bound
    for _ in range(200):
        found = bound * (1.0 + math.exp(-found))
    return found
