"""What Megatron Core leaves to its caller when a run resumes: AdamW's step counters and the random streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from converters.errors import StorageError

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import MegatronOptimizer


def _plain_adams(optimizer: MegatronOptimizer) -> list[torch.optim.AdamW]:
    """PyTorch's AdamW wherever it stands in for Transformer Engine's."""
    inner = [getattr(one, "optimizer", None) for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [adam for adam in inner if isinstance(adam, torch.optim.AdamW)]


def allocate(optimizer: MegatronOptimizer) -> None:
    """Give AdamW the state that a first step would.

    Megatron Core's distributed optimizer reads the step number of an existing state before it loads one.
    """
    for adam in _plain_adams(optimizer):
        fresh = [] if adam.state else [p for group in adam.param_groups for p in group["params"]]
        for parameter in fresh:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def count_steps(optimizer: MegatronOptimizer) -> None:
    """Put the step number, which the distributed optimizer stores with a group, back into AdamW's states.

    Each parameter gets a counter of its own: loading gave all of them one tensor, which every one would advance.
    """
    for adam in _plain_adams(optimizer):
        for group in adam.param_groups:
            for state in (adam.state[p] for p in group["params"] if "step" in group):
                state["step"] = torch.tensor(float(group["step"]))


def random_streams() -> dict[str, object]:
    """States of every random stream a step may draw from."""
    import random

    import numpy

    from mbx.models.megatron.core.groups import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def restore_random(states: Mapping[str, object]) -> None:
    import random

    import numpy

    from mbx.models.megatron.core.groups import get_cuda_rng_tracker

    random.setstate(states["python"])  # type: ignore[arg-type]
    numpy.random.set_state(states["numpy"])  # type: ignore[arg-type]
    torch.set_rng_state(_tensor(states["torch"]))
    torch.cuda.set_rng_state(_tensor(states["cuda"]))
    get_cuda_rng_tracker().set_states(states["tracker"])


def _tensor(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise StorageError(f"a random state should be a tensor, got {type(value).__name__}")
    return value
