"""Signed 8-bit codes under a scale a row or a group: decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from converters.codecs.arithmetic.common import (
    Arithmetic,
    Parts,
    any_in_groups,
    as_scales,
    chunks_of,
    divisors,
    in_groups,
    over,
    part,
    require_finite,
)
from converters.codecs.int8 import BYTES_PER_WORD
from converters.errors import StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.int8 import Int8

ZERO = 128  # the byte that stands for 0 in packed codes


def decode_int8(codec: Int8, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Int8.decode`."""
    codes = part(parts, "codes", torch.int32 if codec.packed else torch.int8)
    scale = part(parts, "scale", torch.bfloat16, torch.float16, torch.float32).reshape(codes.shape[0], -1)
    width = codes.shape[1]
    if codec.packed:
        declared = [int(n) for n in part(parts, "shape", torch.int64, torch.int32)]
        if len(declared) != 2 or -(-declared[1] // BYTES_PER_WORD) != width or declared[0] < codes.shape[0]:
            raise StorageError(f"`weight_shape` says {declared}; the packed words are {list(codes.shape)}")
        width = declared[1]
    out = torch.empty((codes.shape[0], width), dtype=dtype or torch.bfloat16, device=codes.device)
    for rows in chunks_of(out):
        chunk = codes[rows].contiguous()
        if codec.packed:  # little-endian words: their bytes are the elements in order
            chunk = (chunk.view(torch.uint8).to(torch.int16) - ZERO)[:, :width]
        groups = in_groups(chunk.to(scale.dtype), codec.group)
        out[rows].copy_((groups * scale[rows].unsqueeze(-1)).flatten(1)[:, :width])
    return out


def encode_int8(
    codec: Int8, tensor: torch.Tensor, scale: torch.Tensor | None, shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Int8.encode`."""
    shapes = codec.stored_shapes(tuple(tensor.shape))
    chunks = list(chunks_of(tensor))
    amax = torch.cat([in_groups(tensor[rows].to(torch.float32), codec.group).abs().amax(dim=-1) for rows in chunks])
    require_finite(amax, codec.name)
    if scale is None:
        scale = int8_of_largest(codec, amax)
    divisor = divisors(scale).reshape(amax.shape).unsqueeze(-1)
    codes = torch.empty(shapes["codes"], dtype=torch.int32 if codec.packed else torch.int8, device=tensor.device)
    for rows in chunks:
        groups = in_groups(tensor[rows].to(torch.float32), codec.group)
        found = (groups / divisor[rows]).round_().clamp_(-128, 127).flatten(1)[:, : tensor.shape[1]]
        if codec.packed:
            stored = pad((found + ZERO).to(torch.uint8), (0, -tensor.shape[1] % BYTES_PER_WORD), value=ZERO)
            codes[rows] = stored.contiguous().view(torch.int32)
        else:
            codes[rows] = found.to(torch.int8)
    if not codec.packed:
        return {"codes": codes, "scale": scale}
    return {"codes": codes, "scale": scale, "shape": torch.tensor(shape or tensor.shape, dtype=torch.int64)}


def int8_of_largest(codec: Int8, largest: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored, by the largest magnitudes under them."""
    fresh = torch.where(largest > 0, over(largest, 127.5), torch.ones_like(largest))
    return as_scales(fresh, codec.scale_dtype)


INT8 = Arithmetic(decode_int8, encode_int8, any_in_groups, int8_of_largest)
