"""The validation loss of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mbx.train.data.evaluation import OnePass
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe
from mbx.train.run.batches import Batches

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel


def validation_loss(
    recipe: Recipe, ranks: Ranks, chunks: Sequence[DistributedDataParallel], batches: Batches, rows: OnePass
) -> float:
    """The mean over every token of one pass over `rows`. Collective."""
    t, p = recipe.train, recipe.parallel
    size = rows.batch(t.global_batch, t.micro_batch * ranks.dp * (p.pp if p.vpp > 1 else 1))
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        total = torch.stack(
            [batches.run(rows, number, size, forward_only=True) for number in range(-(-rows.total // size))]
        ).sum(0)
    for chunk in chunks:
        chunk.train()
    return float(total[0] / total[1].clamp(min=1))
