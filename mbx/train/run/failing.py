"""What errors of libraries mean for a run: memory that was not there, a rank that died, stands still or is far."""

from __future__ import annotations

import torch

from converters.errors import DeviceError, MbxError
from mbx.train.checkpoints.state import latest
from mbx.train.run import memory
from mbx.train.run.prepare import Prepared


def explained(prepared: Prepared, error: RuntimeError) -> MbxError | None:
    """The error in a user's words; None where it is none of these."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return memory.explain(prepared, error)
    # gloo's errors have no class of their own
    lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
    return _without_others(prepared, error) if lost else None


def _without_others(prepared: Prepared, error: RuntimeError) -> DeviceError:
    """Which rank waited for how long at most, what the backend said, and where the run goes on."""
    said, found = " ".join(str(error).split()), latest(prepared.recipe.run_dir)
    start = f"starts it at {found.name}" if found else "begins it anew, as it has no checkpoint"
    return DeviceError(
        f"rank {prepared.ranks.rank} of {prepared.ranks.world_size} waited for another that died or did not answer "
        f"within run.timeout_s={prepared.recipe.run.timeout_s}: {said[:300]}",
        hint=f"the other ranks' messages say why; ‹continue› {start}",
    )
