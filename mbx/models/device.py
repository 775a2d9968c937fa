"""Where a forward pass runs: on a CPU under patches, or on GPUs with Transformer Engine in real fp32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from converters.errors import DeviceError, LayoutError, UsageError

DEVICES = ("cpu", "cuda")
#: Seconds that processes wait for each other: one of them also runs the other side of a comparison.
_PATIENCE_S = 7200.0


@dataclass(frozen=True, slots=True)
class Spread:
    """How Megatron Core's side is spread over the processes that torchrun started, and what it computes in."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    device: str = "cpu"
    dtype: str = "fp32"

    def check(self, world: int) -> None:
        """LayoutError where the layout does not use every one of `world` processes."""
        if world % (self.tp * self.pp) or world % (self.ep * self.pp) or world > self.pp * max(self.tp, self.ep):
            raise LayoutError(
                f"tp {self.tp}, pp {self.pp}, ep {self.ep} do not use {world} process(es)",
                hint="start pp x max(tp, ep) of them with torchrun --nproc-per-node",
            )


#: One process, on the CPU, in fp32.
ONE_PROCESS = Spread()


def world_of() -> tuple[int, int]:
    """This process's rank, and how many there are, from torchrun's environment; (0, 1) without.

    UsageError where the two do not go together: a rank that nobody started would wait for a report that nobody makes.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UsageError(
            f"the environment says RANK={rank} of WORLD_SIZE={world}", hint="unset both, or start with torchrun"
        )
    return int(rank), int(world)


def is_main() -> bool:
    """Whether this is rank 0, which has results and speaks for all."""
    return world_of()[0] == 0


@contextlib.contextmanager
def megatron_on(device: str, *, tp: int = 1, pp: int = 1, ep: int = 1) -> Iterator[None]:
    """A process group in which Megatron Core builds and runs models on `device`: torchrun's, or one of one rank.

    On `cuda`, TF32 stays off inside the block, for Transformer Engine as well. Raises UsageError for another device
    name, DeviceError where there is no GPU or no Transformer Engine, LayoutError for a layout that does not fit.
    """
    from mbx.models.cpu import megatron_on_cpu, process_group

    if device not in DEVICES:
        raise UsageError(f"device must be `cpu` or `cuda`, got `{device}`")
    rank, world = world_of()
    Spread(tp, pp, ep, device).check(world)
    group = partial(process_group, tp=tp, pp=pp, ep=ep, rank=rank, world_size=world, timeout_s=_PATIENCE_S)
    if device == "cpu":
        with megatron_on_cpu(), group():
            yield
        return
    _import_transformer_engine()
    _choose_gpu()
    with _no_tf32(), group(backend="cpu:gloo,cuda:nccl"):
        yield


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

    The override is read when cuBLAS starts, so it holds for the rest of the process and is not taken back.
    """
    import torch

    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
