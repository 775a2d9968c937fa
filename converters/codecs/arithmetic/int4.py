"""Signed 4-bit codes in groups of one scale, eight to a word: decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from converters.codecs.arithmetic.common import (
    Arithmetic,
    Parts,
    any_in_groups,
    as_scales,
    check_given,
    chunks_of,
    divisors,
    in_groups,
    over,
    pack_nibbles,
    part,
    require_finite,
    unpack_nibbles,
)
from converters.codecs.base import ceil_div
from converters.codecs.int4 import CODES_PER_WORD
from converters.errors import StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.int4 import Int4Packed

ZERO = 8  # the nibble that stands for 0: codes are stored plus 8
PROBE = 4  # elements of a group that are tried before all of them


def decode_int4(codec: Int4Packed, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Int4Packed.decode`."""
    packed = part(parts, "packed", torch.int32)
    scale = part(parts, "scale", torch.bfloat16, torch.float16, torch.float32)
    full = codec.decoded_shape({"packed": tuple(packed.shape), "scale": tuple(scale.shape)})
    declared = [int(n) for n in part(parts, "shape", torch.int64, torch.int32)]
    if len(declared) != 2 or ceil_div(declared[1], CODES_PER_WORD) != packed.shape[1] or declared[0] < full[0]:
        raise StorageError(f"`weight_shape` says {declared}; the packed words hold {list(full)}")
    width = declared[1]
    values = torch.arange(-ZERO, ZERO).to(scale.dtype)
    out = torch.empty((full[0], width), dtype=dtype or torch.bfloat16, device=packed.device)
    for rows in chunks_of(out):
        # Little-endian words: their bytes, low nibble first, are the elements in order.
        chunk = unpack_nibbles(packed[rows].contiguous().view(torch.uint8), values)
        groups = in_groups(chunk, codec.group)
        out[rows].copy_((groups * scale[rows].unsqueeze(-1)).flatten(1)[:, :width])
    return out


def encode_int4(
    codec: Int4Packed, tensor: torch.Tensor, scale: torch.Tensor | None, shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Int4Packed.encode`."""
    shapes = codec.stored_shapes(tuple(tensor.shape))
    check_given(scale, shapes["scale"])
    width = tensor.shape[1]
    packed = torch.empty(shapes["packed"], dtype=torch.int32, device=tensor.device)
    dtype = as_scales(torch.ones(()), codec.scale_dtype).dtype
    scales = torch.empty(shapes["scale"], dtype=dtype, device=tensor.device) if scale is None else scale
    for rows in chunks_of(tensor):
        groups = in_groups(tensor[rows].to(torch.float32), codec.group)
        require_finite(groups.abs().amax(dim=-1), codec.name)
        if scale is None:
            scales[rows] = _scales_of(groups, dtype)
        codes = (
            (groups / divisors(scales[rows]).unsqueeze(-1))
            .round_()
            .clamp_(-ZERO, ZERO - 1)
            .flatten(1)[:, :width]
            .to(torch.int8)
        )
        nibbles = pad((codes + ZERO).to(torch.uint8), (0, -width % CODES_PER_WORD))
        packed[rows] = pack_nibbles(nibbles).view(torch.int32)
    return {"packed": packed, "scale": scales, "shape": torch.tensor(shape or tensor.shape, dtype=torch.int64)}


def _scales_of(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale [n, g] of each group [n, g, group] of fp32 values: one that is exact if there is one, else amax / 7.5."""
    flat = groups.flatten(0, 1)
    amax = flat.abs().amax(dim=-1)
    scales = over(amax, 7.5).clamp(min=torch.finfo(torch.float32).eps).to(dtype)
    # Groups still without an exact scale. A group of zeros needs none.
    pending = torch.nonzero(amax > 0).flatten()
    # Ordinary weights fail on their first elements; only survivors are worth a full look.
    probe = flat[:, :PROBE].contiguous()[pending]
    for k in range(ZERO, 0, -1):
        nearest = over(amax, k).to(dtype)
        for candidate in _with_neighbours(nearest) if k & (k - 1) else (nearest,):
            hopeful = _is_exact(probe, candidate[pending])
            if not bool(hopeful.any()):
                continue
            survivors = pending[hopeful]
            exact = _is_exact(flat[survivors], candidate[survivors])
            scales[survivors[exact]] = candidate[survivors[exact]]
            keep = ~hopeful
            keep[hopeful] = ~exact
            pending, probe = pending[keep], probe[keep]
    return scales.view(groups.shape[0], groups.shape[1])


def _with_neighbours(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A scale and the values of its dtype next to it: rounding amax and then amax / k may miss by one step."""
    zero, infinity = torch.zeros_like(scale), torch.full_like(scale, float("inf"))
    return scale, torch.nextafter(scale, zero), torch.nextafter(scale, infinity)


def _is_exact(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Whether each row of fp32 `values` [n, e] is what decoding its 4-bit codes under `scale` [n] gives."""
    codes = (values / divisors(scale).unsqueeze(-1)).round_()
    decoded = (codes.to(scale.dtype) * scale.unsqueeze(-1)).to(torch.float32)
    in_range = (codes >= -ZERO) & (codes < ZERO)
    return ((decoded == values) & in_range).all(dim=-1)


INT4 = Arithmetic(decode_int4, encode_int4, any_in_groups)
