"""What families change in how tokens are sent to experts.

Like `family_layers` this file imports torch when imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def score_by_softmax(layers: Iterable[Any]) -> None:
    """Make routers choose by softmax probabilities and a bias, and weigh by the probabilities (ERNIE 4.5).

    Megatron Core adds a bias to sigmoid scores alone: it is given logits whose sigmoids are the probabilities.
    """
    for layer in layers:
        if (router := getattr(layer.mlp, "router", None)) is not None:
            router.gating = _as_probabilities(router.gating)


def _as_probabilities(gating: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [s, b, hidden] → [s, b, experts]"""
        return torch.logit(torch.softmax(gating(tokens).float(), dim=-1))

    return logits
