"""The process group, Megatron Core's parallel state and random streams, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from converters.errors import DeviceError
from mbx.models.device import Spread
from mbx.train.recipe.sections import Recipe
from mbx.train.recipe.world import check_world, smallest_world

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place. `device` is `cpu` or `cuda`; `te` says whether Transformer Engine's layers are used."""

    rank: int
    world_size: int
    local_rank: int
    dp: int
    device: str
    te: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and trackers."""
        return self.rank == 0


def planned_ranks(recipe: Recipe, *, dry: bool = False) -> Ranks:
    """Where this process will stand, from torchrun's environment; errors come before any group or GPU work.

    A `dry` run outside torchrun is planned for the smallest world that the recipe fits.
    """
    import importlib.util

    import torch

    world_size = int(os.environ.get("WORLD_SIZE") or (smallest_world(recipe) if dry else 1))
    device = recipe.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("run.device is `cuda`, but there is none", hint="run.device=cpu runs on gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise DeviceError(f"local rank {local_rank} has no GPU; this machine has {torch.cuda.device_count()}")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    te = recipe.run.kernels == "te" or (recipe.run.kernels == "auto" and device == "cuda" and has_te)
    if te and (device == "cpu" or not has_te):
        raise DeviceError("run.kernels is `te`: that needs a GPU and transformer_engine", hint="run.kernels=local")
    if te:
        import transformer_engine.pytorch  # noqa: F401  # before the first CUDA call: it loads its own cuDNN
    rank = int(os.environ.get("RANK", "0"))
    return Ranks(rank, world_size, local_rank, check_world(recipe, world_size), device, te)


def spread_of(recipe: Recipe, ranks: Ranks) -> Spread:
    """The recipe's axes and precision as Megatron Core's models are built and spread."""
    p = recipe.parallel
    return Spread(p.tp, p.pp, p.ep, ranks.device, recipe.train.precision, p.etp, p.vpp, p.cp)


@contextlib.contextmanager
def session(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """torch.distributed and Megatron Core's parallel state, torn down on exit; on a CPU, gloo and patched names."""
    import torch

    from mbx.models.megatron.processes import process_group

    cuda = ranks.device == "cuda"
    with contextlib.ExitStack() as stack:
        if cuda:
            torch.cuda.set_device(ranks.local_rank)
        else:
            from mbx.models.megatron.core.cpu import megatron_on_cpu

            stack.enter_context(megatron_on_cpu())
            stack.enter_context(_cpu_tensors())
        backend = "nccl" if cuda else "gloo"
        joined = partial(process_group, spread_of(recipe, ranks), backend=backend, timeout_s=recipe.run.timeout_s)
        stack.enter_context(joined(rank=ranks.rank, world_size=ranks.world_size))
        seed_everything(recipe.train.seed)
        if recipe.train.deterministic:
            stack.enter_context(_deterministic(ranks))
        yield


def seed_everything(seed: int) -> None:
    """Random streams as Megatron-LM seeds them: a stage of the pipeline adds 100 times its number."""
    import numpy
    import torch

    from mbx.models.megatron.core.groups import model_parallel_cuda_manual_seed, parallel_state

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def _deterministic(ranks: Ranks) -> Iterator[None]:
    """Deterministic kernels inside the block; the process is left as it was found."""
    import torch

    wanted = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}
    added = {name: value for name, value in wanted.items() if ranks.device == "cuda" and name not in os.environ}
    found = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.update(added)
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(found[0], warn_only=found[1])
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _cpu_tensors() -> Iterator[None]:
    """Let Megatron Core's optimizer and schedules work on CPU tensors.

    They create scalars with `device="cuda"` and compare type strings with `torch.cuda.…`; both are answered as a
    GPU would. The mode covers this thread only, and only until the block ends.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    kind = torch.Tensor.type

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., object],
            types: Sequence[type],
            args: Sequence[object] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            named = dict(kwargs or {})
            if func is kind and len(args) == 1 and not named:
                return str(kind(cast(torch.Tensor, args[0]))).replace("torch.", "torch.cuda.", 1)
            if func is torch.Tensor.cuda:
                return args[0]
            device = named.get("device")
            if isinstance(device, str) and device.startswith("cuda"):
                named["device"] = "cpu"
            return func(*args, **named)

    with Mode():
        yield


def on_any_rank(flag: bool, device: torch.device | str, group: torch.distributed.ProcessGroup | None = None) -> bool:
    """Whether `flag` is set on a rank of `group`, of all ranks without one; the same answer on each. Collective."""
    import torch

    if torch.distributed.get_world_size(group) == 1:
        return flag
    told = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(told, group=group)
    return bool(told.item() > 0)
