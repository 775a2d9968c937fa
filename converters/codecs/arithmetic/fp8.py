"""FP8 E4M3 codes times fp32 scales, per block, per output channel or per tensor: decode and encode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from converters.codecs.arithmetic.common import (
    CHUNK_ELEMENTS,
    Arithmetic,
    Parts,
    as_scales,
    check_given,
    chunks_of,
    over,
    part,
    require_finite,
    row_chunks,
    scale_to_fp32,
)
from converters.codecs.base import ceil_div
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.fp8 import Fp8Block, Fp8Scaled, ScaleRule

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def decode_block(codec: Fp8Block, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Fp8Block.decode`."""
    weight = part(parts, "weight", FP8)
    scale = part(parts, "scale")
    codec.decoded_shape({"weight": tuple(weight.shape), "scale": tuple(scale.shape)})
    out = torch.empty(weight.shape, dtype=dtype or torch.bfloat16, device=weight.device)
    grids = scale_to_fp32(scale).reshape(-1, *scale.shape[-2:])
    for w, s, o in zip(_matrices(weight), grids, _matrices(out), strict=True):
        for rows, cols in _tiles(w.shape[0], w.shape[1], codec.block):
            blocks = _blocks(fp8_to_fp32(w[rows, cols]), codec.block)
            blocks.mul_(s[_grid(rows, codec.block[0]), None, _grid(cols, codec.block[1]), None])
            o[rows, cols].copy_(_unblock(blocks, o[rows, cols]))
    return out


def _tiles(num_rows: int, num_cols: int, block: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Whole blocks of rows and columns, about CHUNK_ELEMENTS at a time however long a row is."""
    width = max(1, CHUNK_ELEMENTS // math.prod(block)) * block[1]
    for rows in row_chunks(num_rows, min(width, num_cols), block[0]):
        for start in range(0, num_cols, width):
            yield rows, slice(start, min(start + width, num_cols))


def encode_block(
    codec: Fp8Block, tensor: torch.Tensor, scale: torch.Tensor | None, _shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Fp8Block.encode`."""
    scale_shape = codec.stored_shapes(tuple(tensor.shape))["scale"]
    check_given(scale, scale_shape)
    weight = torch.empty(tensor.shape, dtype=FP8, device=tensor.device)
    used = scale_to_fp32(scale) if scale is not None else weight.new_empty(scale_shape, dtype=torch.float32)
    grids = used.reshape(-1, *scale_shape[-2:])
    for x, s, w in zip(_matrices(tensor), grids, _matrices(weight), strict=True):
        for rows in chunks_of(x, codec.block[0]):
            blocks = _blocks(x[rows].to(torch.float32), codec.block)
            amax = blocks.abs().amax(dim=(1, 3))
            require_finite(amax, codec.name)
            grid = _grid(rows, codec.block[0])
            if scale is None:
                # The codes belong to the scale that is stored, so round it first.
                s[grid] = scale_to_fp32(as_scales(_scale_of(amax, codec.scale_rule), codec.scale_dtype))
            if scale is None and codec.scale_rule == "reciprocal":
                # The stored scale is a rounded reciprocal of this factor; Transformers multiplies by the factor.
                # Not in place: of fp32 values these are views.
                blocks = blocks * _where_positive(FP8_MAX / amax, amax)[:, None, :, None]
            else:
                blocks = _divide(blocks, s[grid, None, :, None])
            blocks.clamp_(-FP8_MAX, FP8_MAX)  # PyTorch releases differ in whether the cast saturates
            w[rows].copy_(_unblock(blocks, w[rows]))
    return {"weight": weight, "scale": as_scales(used, codec.scale_dtype) if scale is None else scale}


def any_by_block_scale(codec: Fp8Block, mask: torch.Tensor) -> torch.Tensor:
    """`Fp8Block.any_by_scale`."""
    grid = codec.stored_shapes(tuple(mask.shape))["scale"]
    found = [_blocks(matrix, codec.block).any(dim=3).any(dim=1) for matrix in _matrices(mask)]
    return torch.stack(found).reshape(grid)


def decode_scaled(codec: Fp8Scaled, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Fp8Scaled.decode`."""
    weight = part(parts, "weight", FP8)
    scale = part(parts, "scale", torch.float32, torch.bfloat16, torch.float16)
    codec.decoded_shape({"weight": tuple(weight.shape), "scale": tuple(scale.shape)})
    out = torch.empty(weight.shape, dtype=dtype or torch.bfloat16, device=weight.device)
    column = scale.to(torch.float32).reshape(-1, 1).expand(weight.shape[0], 1)
    for rows in chunks_of(weight):
        out[rows].copy_(fp8_to_fp32(weight[rows]).mul_(column[rows]))
    return out


def encode_scaled(
    codec: Fp8Scaled, tensor: torch.Tensor, scale: torch.Tensor | None, _shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Fp8Scaled.encode`."""
    scale_shape = codec.stored_shapes(tuple(tensor.shape))["scale"]
    chunks = list(chunks_of(tensor))
    amax = torch.cat([tensor[rows].to(torch.float32).abs().amax(dim=1, keepdim=True) for rows in chunks])
    require_finite(amax, codec.name)
    if scale is None:
        scale = scaled_of_largest(codec, amax if codec.strategy == "channel" else amax.amax()).reshape(scale_shape)
    codec.decoded_shape({"weight": tuple(tensor.shape), "scale": tuple(scale.shape)})
    column = scale.to(torch.float32).reshape(-1, 1).expand(tensor.shape[0], 1)
    weight = torch.empty(tensor.shape, dtype=FP8, device=tensor.device)
    for rows in chunks:
        scaled = _divide(tensor[rows].to(torch.float32), column[rows])
        weight[rows].copy_(scaled.clamp_(-FP8_MAX, FP8_MAX))
    return {"weight": weight, "scale": scale}


def scaled_of_largest(codec: Fp8Scaled, largest: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored, which the codes belong to, by the largest magnitudes under them."""
    return as_scales(_scale_of(largest, "amax"), codec.scale_dtype)


def any_by_scaled_scale(codec: Fp8Scaled, mask: torch.Tensor) -> torch.Tensor:
    """`Fp8Scaled.any_by_scale`."""
    found = mask.any(dim=1) if codec.strategy == "channel" else mask.any()
    return found.reshape(codec.stored_shapes(tuple(mask.shape))["scale"])


def _grid(span: slice, block: int) -> slice:
    return slice(span.start // block, ceil_div(span.stop, block))


def _blocks(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A matrix [n, m], zero-padded, as [n/bn, bn, m/bm, bm]."""
    (n, m), (bn, bm) = matrix.shape, block
    if n % bn or m % bm:
        matrix = pad(matrix, (0, -m % bm, 0, -n % bn))
    return matrix.view(ceil_div(n, bn), bn, ceil_div(m, bm), bm)


def _unblock(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(2, 3).flatten(0, 1)[: like.shape[0], : like.shape[1]]


def fp8_to_fp32(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 as fp32 through a table: torch's own cast is scalar on a CPU, 2.7 ns an element against 0.5."""
    if codes.device.type != "cpu":
        return codes.to(torch.float32)
    table = torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.float32)
    index = codes.contiguous().view(torch.uint8).flatten().to(torch.int32)
    return table.index_select(0, index).view(codes.shape)


def _scale_of(amax: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """fp32 scale of a block by its largest magnitude; 1 where that is zero or too small for a scale to exist."""
    scale = over(amax, FP8_MAX) if rule == "amax" else 1.0 / (FP8_MAX / amax)
    if rule == "ue8m0":
        # frexp, not log2: exact at powers of two. Transformers stops at the least normal fp32, 2**-126.
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
        scale = torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), scale)
    return _where_positive(scale, scale)


def _where_positive(values: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """`values` where `test` is positive, else 1."""
    return torch.where(test > 0, values, torch.ones_like(values))


def _divide(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 values / scale, with a given scale of zero read as 1."""
    return values / torch.where(scale == 0, torch.ones_like(scale), scale)


def _matrices(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n, m] as [k, n, m]."""
    return tensor.reshape(-1, *tensor.shape[-2:])


BLOCK = Arithmetic(decode_block, encode_block, any_by_block_scale)
SCALED = Arithmetic(decode_scaled, encode_scaled, any_by_scaled_scale, scaled_of_largest)
