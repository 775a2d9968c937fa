"""E2M1 codes under E8M0 exponents: decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from converters.codecs.arithmetic.common import (
    Arithmetic,
    Parts,
    check_given,
    chunks_of,
    near_infinity,
    over,
    pack_nibbles,
    part,
    require_finite,
    require_no_overflow,
    unpack_nibbles,
)
from converters.codecs.mxfp4 import GROUP
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.mxfp4 import Mxfp4

EXPONENT_BIAS = 127
LARGEST_EXPONENT = 254  # 255 stands for NaN

#: E2M1 magnitudes by their low three bits; bit 3 is the sign (OCP Microscaling Formats v1.0, table 5.3.3).
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_mxfp4(codec: Mxfp4, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Mxfp4.decode`; rows keep the order that they are stored in, and the result is a transposed view of them.

    Megatron Core's own order is the stored one: transposing here, and back there, took two thirds of an import.
    """
    dtype = dtype or torch.bfloat16
    blocks, scale = part(parts, "blocks", torch.uint8), part(parts, "scale", torch.uint8)
    shape = codec.decoded_shape({"blocks": tuple(blocks.shape), "scale": tuple(scale.shape)})
    doubled = 2 * torch.tensor(MAGNITUDES + tuple(-v for v in MAGNITUDES), dtype=dtype)
    factors = _half_factors(dtype).to(blocks.device)
    experts, width, num_rows = shape
    out = torch.empty((experts, num_rows, width), dtype=dtype, device=blocks.device)
    for expert in range(experts):
        for rows in chunks_of(out[expert]):
            tile = out[expert, rows]
            unpack_nibbles(blocks[expert, rows].flatten(1), doubled, tile)
            factor = factors.index_select(0, scale[expert, rows].flatten().to(torch.int32))
            tile.view(-1, GROUP).mul_(factor.unsqueeze(-1))
    return out.transpose(1, 2)


def encode_mxfp4(
    codec: Mxfp4, tensor: torch.Tensor, scale: torch.Tensor | None, _shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Mxfp4.encode`."""
    shapes = codec.stored_shapes(tuple(tensor.shape))
    check_given(scale, shapes["scale"])
    blocks = torch.empty(shapes["blocks"], dtype=torch.uint8, device=tensor.device)
    scales = torch.empty(shapes["scale"], dtype=torch.uint8, device=tensor.device) if scale is None else scale
    overflows = False
    for expert in range(tensor.shape[0]):
        for rows in chunks_of(tensor[expert].T):
            groups = tensor[expert, :, rows].contiguous().T.contiguous().to(torch.float32)
            groups = groups.reshape(groups.shape[0], -1, GROUP)
            amax = groups.abs().amax(dim=-1)
            require_finite(amax, codec.name)
            if scale is None:
                scales[expert, rows] = _exponents_of(amax)
                overflows = overflows or near_infinity(amax)
            blocks[expert, rows] = pack_nibbles(_codes(groups, scales[expert, rows]))
    parts = {"blocks": blocks, "scale": scales}
    if overflows:
        require_no_overflow(decode_mxfp4(codec, parts, None), codec.name)
    return parts


def any_by_mxfp4_scale(codec: Mxfp4, mask: torch.Tensor) -> torch.Tensor:
    """`Mxfp4.any_by_scale`."""
    experts, rows, groups = codec.stored_shapes(tuple(mask.shape))["scale"]
    return mask.view(experts, groups, GROUP, rows).any(dim=2).transpose(1, 2)


def _half_factors(dtype: torch.dtype) -> torch.Tensor:
    """[256] values 2 ** (scale - 128) by stored scale: half the true factor, so that 2 ** 128 needs no infinity."""
    return torch.ldexp(torch.ones(256), torch.arange(256) - EXPONENT_BIAS - 1).to(dtype)


def _exponents_of(amax: torch.Tensor) -> torch.Tensor:
    """Biased exponents ceil(log2(amax / 6)) + 127 as uint8, 0 for zero blocks; frexp is exact where log2 is not."""
    mantissa, exponent = torch.frexp(over(amax, MAGNITUDES[-1]))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent) + EXPONENT_BIAS
    return torch.where(amax > 0, exponent, torch.zeros_like(exponent)).clamp(0, LARGEST_EXPONENT).to(torch.uint8)


def _codes(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 codes, uint8 [n, g, 32]; groups: fp32 [n, g, 32], scales: uint8 [n, g]."""
    return nearest_e2m1(groups / _half_factors(torch.float32).to(scales.device)[scales.long()].unsqueeze(-1) / 2)


def nearest_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 codes of fp32 values, uint8, ties to even, saturated."""
    size = scaled.abs().clamp_(max=MAGNITUDES[-1])
    # Steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6. `round` breaks ties to even, and even codes have even steps.
    coarse = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    codes = torch.where(size < 2, (size * 2).round_(), coarse).to(torch.uint8)
    return codes | (torch.signbit(scaled).to(torch.uint8) << 3)


MXFP4 = Arithmetic(decode_mxfp4, encode_mxfp4, any_by_mxfp4_scale)
