"""Casts between any two dtypes, elementwise on raw bytes. Imports torch: `converters.casts` is the way in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from converters.errors import UnsupportedError
from converters.tensors import Shape

Bytes = npt.NDArray[np.uint8]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def in_torch(data: Bytes, name: str, dtype: str, shape: Shape) -> torch.Tensor:
    """The values of a tensor `name` of `shape` that `data` holds; UnsupportedError for a dtype that torch has not."""
    if dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"torch has no dtype for `{name}`, which is {dtype}")
    return torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[dtype]).reshape(shape)


def convert(data: Bytes, source: str, target: str, shift: int) -> Bytes:
    """`data` (contiguous, of dtype `source`) cast to `target`, `shift` added first.

    A shift is computed in fp32 and rounded once to the target dtype.
    """
    tensor = torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[source])
    if shift:
        tensor = tensor.to(torch.float32, copy=True).add_(shift)
    out = tensor.to(TORCH_DTYPES[target])
    cast: Bytes = out.view(torch.uint8).numpy()
    return cast
