"""Where a forward pass runs: on a CPU under patches, or on one GPU with Transformer Engine in real fp32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from converters.errors import DeviceError, UsageError

DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def megatron_on(device: str) -> Iterator[None]:
    """A process group of one rank in which Megatron Core builds and runs models on `device`.

    On `cuda`, TF32 stays off inside the block, for Transformer Engine as well. Raises UsageError for another device
    name, DeviceError where there is no GPU or no Transformer Engine.
    """
    from mbx.mcore.cpu import megatron_on_cpu, process_group

    if device not in DEVICES:
        raise UsageError(f"device must be `cpu` or `cuda`, got `{device}`")
    if device == "cpu":
        with megatron_on_cpu(), process_group():
            yield
        return
    _import_transformer_engine()
    with _no_tf32(), process_group(backend="cpu:gloo,cuda:nccl"):
        yield


def _import_transformer_engine() -> None:
    """Import it before this process touches CUDA: afterwards its cuDNN symbols may not resolve."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"device `cuda` needs Transformer Engine, which does not import: {error}",
            hint="install transformer-engine[pytorch], or compare on the CPU: --device cpu",
        ) from error
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("device `cuda`: torch sees no GPU", hint="compare on the CPU: --device cpu")


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
