"""Encoding values that may still be what a source's scales give: those keep their scale, others get a fresh one."""

from __future__ import annotations

import torch

from converters.codecs.base import Codec
from converters.tensors import Shape
from converters.torch_casts import TORCH_DTYPES

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def reencode(
    codec: Codec, tensor: torch.Tensor, scale: torch.Tensor | None, shape: Shape | None = None
) -> dict[str, torch.Tensor]:
    """The parts of a tensor or slab. A block that `scale`, the source's, stores without loss keeps it.

    Any other block was changed, by training say, and gets the scale that `codec.encode` derives. `shape` is that of
    the whole tensor. The values are compared as they were decoded: in the codec's dtype, then in that of `tensor`.
    """
    if scale is None:
        return codec.encode(tensor, shape=shape)
    parts = codec.encode(tensor, scale=scale, shape=shape)
    # NaN, from a scale that is one, counts as a difference.
    stored = next(name for name, dtype in TORCH_DTYPES.items() if dtype == scale.dtype)
    decoded = codec.decode(parts, dtype=TORCH_DTYPES[codec.decoded_dtype({"scale": stored})])
    changed = codec.any_by_scale(decoded.to(tensor.dtype) != tensor).reshape(scale.shape)
    if not bool(changed.any()):
        return parts
    word = _WORDS[scale.element_size()]
    fresh = codec.encode(tensor)["scale"].reshape(scale.shape).view(word)
    mixed = torch.where(changed, fresh, scale.view(word)).view(scale.dtype)
    return codec.encode(tensor, scale=mixed, shape=shape)
