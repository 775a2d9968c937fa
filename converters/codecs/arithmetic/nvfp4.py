"""E2M1 codes under E4M3 block scales and one fp32 scale: decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from converters.codecs.arithmetic.common import (
    Arithmetic,
    Parts,
    any_in_groups,
    chunks_of,
    over,
    pack_nibbles,
    part,
    require_finite,
    unpack_nibbles,
)
from converters.codecs.arithmetic.fp8 import FP8, FP8_MAX
from converters.codecs.arithmetic.mxfp4 import MAGNITUDES, nearest_e2m1
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.nvfp4 import Nvfp4

#: Scale of blocks that round to one of zero.
_LEAST = 0.125


def decode_nvfp4(codec: Nvfp4, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Nvfp4.decode`."""
    codes, scale = part(parts, "codes", torch.uint8), part(parts, "scale", FP8)
    whole = part(parts, "whole", torch.float32).reshape(())
    shape = codec.decoded_shape({"codes": tuple(codes.shape), "scale": tuple(scale.shape)})
    values = torch.tensor(MAGNITUDES + tuple(-v for v in MAGNITUDES))
    out = torch.empty(shape, dtype=dtype or torch.bfloat16, device=codes.device)
    for rows in chunks_of(out):
        chunk = unpack_nibbles(codes[rows].contiguous(), values)
        factor = _under(codec, scale[rows].to(torch.float32), whole)
        out[rows].copy_((chunk.view(len(chunk), -1, codec.group) * factor.unsqueeze(-1)).flatten(1))
    return out


def _under(codec: Nvfp4, scale: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What a block's codes are multiplied by, of its scale in fp32 and the tensor's own."""
    return scale / whole if codec.inverse else scale * whole


def _whole_of(codec: Nvfp4, largest: torch.Tensor) -> torch.Tensor:
    """A tensor's own scale by its largest magnitude, as each library finds it; 1 if compressed-tensors' overflows."""
    tiny = torch.finfo(torch.float32).tiny
    if not codec.inverse:
        return over(largest, MAGNITUDES[-1] * FP8_MAX).clamp(min=tiny)
    whole = MAGNITUDES[-1] * FP8_MAX / largest.clamp(min=tiny)
    return torch.where(torch.isfinite(whole), whole, torch.ones_like(whole))


def encode_nvfp4(
    codec: Nvfp4, tensor: torch.Tensor, scale: torch.Tensor | None, _shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Nvfp4.encode`."""
    shapes = codec.stored_shapes(tuple(tensor.shape))
    chunks = list(chunks_of(tensor))
    amax = torch.cat([_grouped(codec, tensor[rows]).abs().amax(dim=-1) for rows in chunks])
    require_finite(amax, codec.name)
    whole = codec.held.get("whole")
    whole = _whole_of(codec, amax.amax()) if whole is None else whole.to(tensor.device)
    if scale is None:
        own = over(amax, MAGNITUDES[-1])
        scale = (own * whole if codec.inverse else own / whole).clamp(max=FP8_MAX).to(FP8)
        if codec.inverse:  # compressed-tensors' `calculate_qparams` leaves no scale of zero
            wide = scale.to(torch.float32)
            scale = torch.where(wide == 0, torch.full_like(wide, _LEAST), wide).to(FP8)
    factors = _under(codec, scale.reshape(amax.shape).to(torch.float32), whole.reshape(())).unsqueeze(-1)
    codes = torch.empty(shapes["codes"], dtype=torch.uint8, device=tensor.device)
    for rows in chunks:
        groups, factor = _grouped(codec, tensor[rows]), factors[rows]
        scaled = torch.where(factor == 0, torch.copysign(torch.zeros_like(groups), groups), groups / factor)
        codes[rows] = pack_nibbles(nearest_e2m1(scaled).flatten(1))
    return {"codes": codes, "scale": scale, "whole": whole.reshape(shapes["whole"])}


def _grouped(codec: Nvfp4, rows: torch.Tensor) -> torch.Tensor:
    """[n, m] as fp32 [n, m / group, group]."""
    return rows.to(torch.float32).reshape(rows.shape[0], -1, codec.group)


NVFP4 = Arithmetic(decode_nvfp4, encode_nvfp4, any_in_groups, _whole_of)
