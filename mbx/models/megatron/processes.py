"""Where Megatron Core runs: in a process group, on a CPU under patches or on GPUs with real fp32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from converters.errors import DeviceError, LayoutError, UsageError
from mbx.models.device import ONE_PROCESS, Spread, world_of

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not declare it

#: Seconds that processes wait for each other: one of them also runs the other side of a comparison.
_PATIENCE_S = 7200.0

_T = TypeVar("_T")


@contextlib.contextmanager
def megatron_on(spread: Spread) -> Iterator[None]:
    """A process group in which Megatron Core builds and runs models of a `spread`: torchrun's, or one of one rank.

    On `cuda`, TF32 stays off inside the block, for Transformer Engine as well. Raises DeviceError where
    there is no GPU or no Transformer Engine, LayoutError for a layout that does not fit.
    """
    rank, world = world_of()
    spread.check(world)
    group = partial(process_group, spread, rank=rank, world_size=world, timeout_s=_PATIENCE_S)
    if spread.device == "cpu":
        from mbx.models.megatron.core.cpu import megatron_on_cpu

        with megatron_on_cpu(), group():
            yield
        return
    _import_transformer_engine()
    _choose_gpu()
    with _no_tf32(), group(backend="cpu:gloo,cuda:nccl"):
        yield


@contextlib.contextmanager
def process_group(
    spread: Spread = ONE_PROCESS,
    *,
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
    Raises `LayoutError` where tp·pp or etp·ep·pp does not divide the world, `UsageError` where a group exists already,
    `DeviceError` where the ranks do not meet.
    """
    import torch

    from mbx.models.megatron.core.groups import model_parallel_cuda_manual_seed, parallel_state
    from mbx.models.megatron.core.rotary import forget_tables

    tp, pp, ep, etp = spread.tp, spread.pp, spread.ep, spread.etp
    if world_size % (tp * pp) or world_size % (etp * ep * pp):
        raise LayoutError(
            f"world size {world_size} is not a multiple of tp {tp} x pp {pp} and of etp {etp} x ep {ep} x pp {pp}"
        )
    if torch.distributed.is_initialized():
        raise UsageError("torch.distributed is initialised already", hint="leave the other process group first")
    if world_size > 1 and init_file is None and "MASTER_ADDR" not in os.environ:
        raise UsageError(f"{world_size} processes need an `init_file` to meet at, or torchrun; got neither")

    alone, limit = world_size == 1 and init_file is None, timedelta(seconds=timeout_s)
    store: Store | None = None
    with _meeting(rank, world_size, timeout_s):
        if alone:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        elif init_file is None:
            store = _store_of_this_start(limit)
        torch.distributed.init_process_group(
            backend,
            store=store,
            init_method=None if init_file is None else f"file://{init_file.resolve()}",
            rank=rank,
            world_size=world_size,
            timeout=limit,
        )
    try:
        # the groups within the world have a limit of their own, half an hour unless it is said
        parallel_state.initialize_model_parallel(**spread.sizes, distributed_timeout_minutes=timeout_s / 60)
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        forget_tables()
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():  # a run that is interrupted to start again has no group by then
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _meeting(rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """DeviceError where ranks do not find each other: one that did not start, another's port, a network between."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        said = " ".join(str(error).split())[:300]
        raise DeviceError(
            f"rank {rank} of {world_size} did not meet the others at {place} within {timeout_s:g} s: {said}",
            hint="every node starts the same line, with the same first node and port; the others' messages say "
            "whether one of them ended before",
        ) from error


def _store_of_this_start(limit: timedelta) -> Store | None:
    """Where processes meet that torchrun started again on one node; None where torch's own way will do.

    Its agent keeps one store for all starts (PyTorch 2.4 to 2.13), in which addresses of processes that died are read.
    Nodes count their starts apart, so there the agents are asked for a store a start (`mbx train --launch`).
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch does not declare it
    from torch.distributed.rendezvous import rendezvous

    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not again or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    store, _, _ = next(rendezvous("env://", timeout=limit))
    return PrefixStore(f"start_{again}", store)


def on_every_rank(value: _T) -> _T:
    """Rank 0's `value`; collective."""
    import torch

    if torch.distributed.get_world_size() == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def _choose_gpu() -> None:
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise DeviceError(f"local rank {local} has no GPU; this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)


def _import_transformer_engine() -> None:
    """Import it before this process touches CUDA: afterwards its cuDNN symbols may not resolve."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"device `cuda` needs Transformer Engine, which does not import: {error}",
            hint="install transformer-engine[pytorch], or compare on the CPU: ‹device› cpu",
        ) from error
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("device `cuda`: torch sees no GPU", hint="compare on the CPU: ‹device› cpu")


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Real fp32 products. Transformer Engine asks cuBLAS for TF32 by itself; only the driver's override stops it.

    The override is read when cuBLAS starts, so it holds for the rest of the process and is not taken back; nor is
    Triton's, under which Mamba-2's kernels are compiled, nor what Megatron Core's deterministic mode wants to be set.
    """
    import torch

    os.environ |= {
        "NVIDIA_TF32_OVERRIDE": "0",
        "TRITON_F32_DEFAULT": "ieee",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
