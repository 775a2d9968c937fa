"""Make Megatron Core run without a GPU, for as long as a `with` block lasts.

Megatron Core asks CUDA for the current device, for RNG state and for causal masks even when every tensor lives on a
CPU. The patches stay inside one context manager: nothing is changed by importing this module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import LayoutError, UsageError

if TYPE_CHECKING:
    import torch

_ABSENT = object()


class _Patches:
    """Attribute replacements that are undone in reverse order, absent attributes included."""

    __slots__ = ("_saved",)

    def __init__(self) -> None:
        self._saved: list[tuple[object, str, object]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        self._saved.append((owner, name, getattr(owner, name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Let Megatron Core build, run, save and load models on a CPU; nests, and restores every attribute on exit.

    Patches process-wide names of torch and megatron.core: do not run GPU work in another thread meanwhile.
    The CUDA RNG is torch's CPU generator inside the block.
    """
    import torch
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer import utils as mcore_utils
    from megatron.core.transformer.moe import moe_utils

    def cpu_device() -> torch.device:
        return torch.device("cpu")

    def nothing(device: object = None) -> None:
        del device

    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        del device, clone, graph_safe
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
        del device, graph_safe
        torch.set_rng_state(new_state)

    def causal_mask(sq: int) -> torch.Tensor:
        return torch.ones(sq, sq, dtype=torch.bool).triu(1)

    def window_mask(sq: int, skv: int, window_size: tuple[int, int]) -> torch.Tensor:
        # Inclusive window [i - left, i + right] around the query's own position, as megatron.core.transformer.utils
        # has it; True means masked.
        left, right = window_size
        inside = torch.ones(sq, skv, dtype=torch.bool).triu(skv - sq - left).tril(skv - sq + right)
        return ~inside

    patches = _Patches()
    try:
        patches.set(torch.cuda, "current_device", cpu_device)
        patches.set(torch.cuda, "synchronize", nothing)
        patches.set(torch.cuda, "get_rng_state", get_state)
        patches.set(torch.cuda, "set_rng_state", set_state)
        patches.set(torch.cuda, "manual_seed", torch.manual_seed)
        patches.set(mcore_random, "_get_cuda_rng_state", get_state)
        patches.set(mcore_random, "_set_cuda_rng_state", set_state)
        for module in (fused_softmax, mcore_utils):  # fused_softmax holds its own reference
            patches.set(module, "get_default_causal_mask", causal_mask)
            patches.set(module, "get_sliding_window_causal_mask", window_mask)
        # Without Transformer Engine the name is never bound, and the router reads it; with it, the kernel needs CUDA.
        patches.set(moe_utils, "te_general_gemm", None)
        # 0.16.1 believes in Transformer Engine here whenever its stubs import, then tests isinstance(…, None).
        patches.set(multi_latent_attention, "HAVE_TE", False)
        yield
    finally:
        patches.undo()


@contextlib.contextmanager
def process_group(
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    cp: int = 1,
    vpp: int = 1,
    rank: int = 0,
    world_size: int = 1,
    init_file: Path | None = None,
    backend: str = "gloo",
    seed: int = 1234,
    timeout_s: float = 120.0,
) -> Iterator[None]:
    """Initialise torch.distributed and Megatron Core's parallel state, and tear both down on exit.

    One process needs no network (an in-memory store); several meet at `init_file`, a path on a shared file system
    that does not exist yet, or where torchrun's environment says. Model-parallel RNG streams start from `seed`.
    On a CPU, enter `megatron_on_cpu` first.
    Raises `LayoutError` where tp·pp or etp·ep·pp does not divide the world, `UsageError` where a group exists already.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if world_size % (tp * pp) or world_size % (etp * ep * pp):
        raise LayoutError(
            f"world size {world_size} is not a multiple of tp {tp} x pp {pp} and of etp {etp} x ep {ep} x pp {pp}"
        )
    if torch.distributed.is_initialized():
        raise UsageError("torch.distributed is initialised already", hint="leave the other process group first")
    from_torchrun = world_size > 1 and init_file is None
    if from_torchrun and "MASTER_ADDR" not in os.environ:
        raise UsageError(f"{world_size} processes need an `init_file` to meet at, or torchrun; got neither")

    # torch re-exports its stores without declaring them
    store: torch._C._distributed_c10d.Store | None = None
    if init_file is not None:
        store = torch.distributed.FileStore(str(init_file), world_size)  # type: ignore[attr-defined]
    elif not from_torchrun:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
