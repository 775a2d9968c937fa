"""E4M3 or E2M1 codes of matrices under E8M0 exponents: decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from converters.codecs.arithmetic.common import (
    Arithmetic,
    Parts,
    any_in_groups,
    check_given,
    chunks_of,
    in_groups,
    near_infinity,
    pack_nibbles,
    part,
    require_finite,
    require_no_overflow,
    scale_to_fp32,
    unpack_nibbles,
)
from converters.codecs.arithmetic.fp8 import FP8, FP8_MAX, fp8_to_fp32
from converters.codecs.arithmetic.mxfp4 import EXPONENT_BIAS, LARGEST_EXPONENT, MAGNITUDES, nearest_e2m1
from converters.codecs.mx import GROUP
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.mx import Mxfp4Packed, Mxfp8

#: Mantissa, in [0.5, 1), from which on a largest magnitude counts as the next power of two.
_ROUNDS_UP = 0.875


def decode_mx(codec: Mxfp8 | Mxfp4Packed, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`decode` of both."""
    packed = codec.per_byte == 2
    codes, scale = part(parts, "codes", torch.uint8 if packed else FP8), part(parts, "scale", torch.uint8)
    shape = codec.decoded_shape({"codes": tuple(codes.shape), "scale": tuple(scale.shape)})
    values = torch.tensor(MAGNITUDES + tuple(-v for v in MAGNITUDES))
    out = torch.empty(shape, dtype=dtype or torch.bfloat16, device=codes.device)
    for rows in chunks_of(out):
        chunk = codes[rows].contiguous()
        blocks = in_groups(unpack_nibbles(chunk, values) if packed else fp8_to_fp32(chunk), GROUP)
        out[rows].copy_(blocks.mul_(scale_to_fp32(scale[rows]).unsqueeze(-1)).flatten(1))
    return out


def encode_mx(
    codec: Mxfp8 | Mxfp4Packed, tensor: torch.Tensor, scale: torch.Tensor | None, _shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`encode` of both."""
    shapes = codec.stored_shapes(tuple(tensor.shape))
    check_given(scale, shapes["scale"])
    codes = torch.empty(shapes["codes"], dtype=torch.uint8 if codec.per_byte == 2 else FP8, device=tensor.device)
    scales = torch.empty(shapes["scale"], dtype=torch.uint8, device=tensor.device) if scale is None else scale
    overflows = False
    for rows in chunks_of(tensor):
        blocks = in_groups(tensor[rows].to(torch.float32), GROUP)
        amax = blocks.abs().amax(dim=-1)
        require_finite(amax, codec.name)
        if scale is None:
            scales[rows] = _exponents_of(amax, codec.offset)
            overflows = overflows or near_infinity(amax)
        scaled = (blocks / scale_to_fp32(scales[rows]).unsqueeze(-1)).flatten(1)
        if codec.per_byte == 2:
            codes[rows] = pack_nibbles(nearest_e2m1(scaled))
        else:
            codes[rows].copy_(scaled.clamp_(-FP8_MAX, FP8_MAX))
    parts = {"codes": codes, "scale": scales}
    if overflows:
        require_no_overflow(decode_mx(codec, parts, None), codec.name)
    return parts


def _exponents_of(amax: torch.Tensor, offset: int) -> torch.Tensor:
    """Biased exponents, uint8, of fp32 largest magnitudes; 0 for zeros and for what lies below all exponents."""
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 1 + (mantissa >= _ROUNDS_UP).to(exponent.dtype) - offset + EXPONENT_BIAS
    return torch.where(amax > 0, exponent, torch.zeros_like(exponent)).clamp_(0, LARGEST_EXPONENT).to(torch.uint8)


MX = Arithmetic(decode_mx, encode_mx, any_in_groups)
