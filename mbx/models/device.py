"""Where models run and what they compute in: a device, a dtype, and the processes that a model is spread over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from converters.errors import LayoutError, UsageError

DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Spread:
    """How a Megatron Core model is spread over processes, and what it computes in.

    `vpp` counts the model chunks of a pipeline rank, `cp` the ranks that share a sequence. `etp` is the tensor
    parallelism of expert weights, 1 by default (Megatron-LM's default follows `tp`).
    UsageError for a device or dtype that is not known.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    etp: int = 1
    vpp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("device", self.device, DEVICES), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got `{value}`")

    @property
    def sizes(self) -> dict[str, int | None]:
        """The sizes by Megatron Core's names."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }

    def check(self, world: int) -> None:
        """LayoutError where the layout does not use every one of `world` processes."""
        if world % (self.tp * self.pp) or world % (self.ep * self.pp) or world > self.pp * max(self.tp, self.ep):
            raise LayoutError(
                f"tp {self.tp}, pp {self.pp}, ep {self.ep} do not use {world} process(es)",
                hint="start pp x max(tp, ep) of them with torchrun --nproc-per-node",
            )


#: One process, on the CPU, in fp32.
ONE_PROCESS = Spread()


_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Work that no other process shares, whatever ranks the environment gives: a pod's scheduler may set them for all.

    Within it this process is the only one. UsageError as of `world_of`.
    """
    world_of()
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_of() -> tuple[int, int]:
    """This process's rank, and how many there are, from torchrun's environment; (0, 1) without, and within `alone`.

    UsageError where the two do not go together: a rank that nobody started would wait for a report that nobody makes.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UsageError(
            f"the environment says RANK={rank} of WORLD_SIZE={world}", hint="unset both, or start with torchrun"
        )
    return (0, 1) if _ALONE.get() else (int(rank), int(world))


def is_main() -> bool:
    """Whether this is rank 0, which has results and speaks for all."""
    return world_of()[0] == 0
