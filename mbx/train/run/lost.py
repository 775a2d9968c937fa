"""What a rank says that lost another: one that died, stands still, or cannot be reached."""

from __future__ import annotations

import torch

from converters.errors import DeviceError
from mbx.train.checkpoints.state import latest
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe


def lost_others(error: RuntimeError) -> bool:
    """Whether an error is that of a collective; gloo's have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def without_others(recipe: Recipe, ranks: Ranks, error: RuntimeError) -> DeviceError:
    """Which rank waited for how long at most, what the backend said, and where the run goes on."""
    said = " ".join(str(error).split())
    found = latest(recipe.run_dir)
    start = f"starts it at {found.name}" if found else "begins it anew, as it has no checkpoint"
    return DeviceError(
        f"rank {ranks.rank} of {ranks.world_size} waited for another that died or did not answer "
        f"within run.timeout_s={recipe.run.timeout_s}: {said[:300]}",
        hint=f"the other ranks' messages say why; ‹continue› {start}",
    )
