"""Changes of value: casts and norm offsets, elementwise on raw bytes. Imports torch, so only where needed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

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
}


def restore(original: Bytes, dtype: str, stored: Bytes, stored_dtype: str, changed: Bytes, shift: int) -> Bytes:
    """`changed`, with elements of `original` (both of `dtype`) wherever `original + shift` is exactly `stored`."""
    item, stored_item = TORCH_DTYPES[dtype].itemsize, TORCH_DTYPES[stored_dtype].itemsize
    image = convert(original, dtype, stored_dtype, shift).reshape(-1, stored_item)
    unchanged = (image == stored.reshape(-1, stored_item)).all(axis=1)
    flat: Bytes = changed.reshape(-1, item).copy()
    flat[unchanged] = original.reshape(-1, item)[unchanged]
    return flat.reshape(changed.shape)


def convert(data: Bytes, source: str, target: str, shift: int) -> Bytes:
    """`data` (contiguous, of dtype `source`) cast to `target`, `shift` added first.

    A shift is computed in fp32 and rounded once to the target dtype.
    """
    tensor = torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[source])
    if shift:
        tensor = tensor.to(torch.float32).add_(shift)
    out = tensor.to(TORCH_DTYPES[target])
    cast: Bytes = out.view(torch.uint8).numpy()
    return cast
