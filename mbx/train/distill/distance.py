"""How far a student's hidden states are from its teacher's, and the gradient, in fp32 and some rows at a time."""

from __future__ import annotations

import torch

from mbx.train.model.teacher import LOSS_CHUNK

#: Below this length a state has no direction.
_SHORT = 1e-8


def distances(
    mine: torch.Tensor, its: torch.Tensor, weights: torch.Tensor, loss: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance of every token, [n] in fp32, and the gradient of Σ weights · distance by `mine`, in its dtype.

    mine, its: [n, width]; weights: [n]. `mse`: the mean of the squared differences over the width. `cosine`: 1 less
    the cosine of the angle. No graph is recorded.
    """
    rule = {"mse": _squares, "cosine": _angles}[loss]
    found, gradient = mine.new_empty(len(mine), dtype=torch.float32), torch.empty_like(mine)
    step = max(1, LOSS_CHUNK // mine.shape[1])
    with torch.no_grad():
        for first in range(0, len(mine), step):
            rows = slice(first, first + step)
            found[rows], slope = rule(mine[rows].float(), its[rows].float())
            gradient[rows] = slope.mul_(weights[rows, None])
    return found, gradient


def _squares(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gap = x - y
    return gap.square().mean(1), gap.mul_(2 / x.shape[1])


def _angles(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length, other = (part.norm(dim=1, keepdim=True) for part in (x, y))
    way, its = x / length.clamp(min=_SHORT), y / other.clamp(min=_SHORT)
    cosine = (way * its).sum(1, keepdim=True)
    slope = (cosine * way - its) / length.clamp(min=_SHORT)
    return 1 - cosine[:, 0], slope.masked_fill_(length < _SHORT, 0.0)
