"""The random streams that a step may draw from, as a checkpoint keeps them: a process's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from converters.errors import StorageError


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
