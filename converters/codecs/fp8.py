"""FP8 E4M3 weights with fp32 scales: per block, per output channel or per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from converters.codecs.base import (
    Codec,
    Parts,
    aligned,
    ceil_div,
    part,
    require_finite,
    row_chunks,
    scale_to_fp32,
)
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

ScaleRule = Literal["amax", "reciprocal", "ue8m0"]


@dataclass(frozen=True, slots=True)
class Fp8Block(Codec):
    """`W` [..., N, M] in E4M3 with `W_scale_inv` [..., ceil(N/bn), ceil(M/bm)]; value = code * scale_inv of its block.

    Source of the format: DeepSeek-V3, `inference/kernel.py` (`weight_dequant`) and its paper, section 3.3
    (arXiv:2412.19437); Qwen3-FP8 and MiniMax-M2 store the same. Products are formed in fp32 and rounded once, as in
    Transformers (`integrations/finegrained_fp8.py`, `Fp8Dequantize`).

    `scale_rule` is how `encode` gets a block's scale from its largest magnitude, and the only thing that decides
    whether `encode(decode(p)) == p`:
    - `amax`: amax / 448 (DeepSeek). Exact when the checkpoint's scales came so from amaxes that the decoded dtype
      holds: 448 * scale then rounds back to that amax. Scales of an fp32 master are not recovered from bf16.
    - `reciprocal`: 1 / (448 / amax) (Transformers' `Fp8Quantize`); differs from `amax` in the last bit.
    - `ue8m0`: the next power of two (`scale_fmt: ue8m0`). Exact but for blocks whose largest code is 224 or less,
      which come back with half the scale and twice the codes: the same values.
    Blocks of zeros get scale 1, whatever it was. With `scale=` the codes come back exactly unless a scale is 0 or NaN.
    """

    block: tuple[int, int] = (128, 128)
    scale_rule: ScaleRule = "amax"
    scale_dtype: Literal["F32", "BF16", "F8_E8M0"] = "F32"

    name = "fp8_block"
    suffixes = {"weight": "", "scale": "_scale_inv"}
    discards = (".activation_scale", "_activation_scale", ".input_scale")

    def stored_dtypes(self) -> dict[str, str]:
        return {"weight": "F8_E4M3", "scale": self.scale_dtype}

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) < 2:
            raise LayoutError(f"{self.name} needs two dims or more; got shape {list(shape)}")
        grid = (ceil_div(shape[-2], self.block[0]), ceil_div(shape[-1], self.block[1]))
        return {"weight": shape, "scale": (*shape[:-2], *grid)}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        shape, scale = stored_shapes["weight"], stored_shapes["scale"]
        expected = self.stored_shapes(shape)["scale"]
        if scale != expected:
            raise StorageError(
                f"scales of a {list(shape)} weight in {self.block[0]}x{self.block[1]} blocks: "
                f"expected shape {list(expected)}; got {list(scale)}",
                hint="check `quantization_config.weight_block_size` in config.json",
            )
        return shape

    def row_alignment(self, shape: Shape) -> int:
        return self.block[0] if len(shape) == 2 else 1

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        alignment = self.row_alignment(stored_shapes["weight"])
        aligned(start, alignment)
        return (start, stop) if role == "weight" else (start // alignment, ceil_div(stop, alignment))

    def decode(self, parts: Parts, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        weight = part(parts, "weight", FP8)
        scale = part(parts, "scale")
        self.decoded_shape({"weight": tuple(weight.shape), "scale": tuple(scale.shape)})
        out = torch.empty(weight.shape, dtype=dtype)
        grids = scale_to_fp32(scale).reshape(-1, *scale.shape[-2:])
        for w, s, o in zip(_matrices(weight), grids, _matrices(out), strict=True):
            for rows in row_chunks(w.shape[0], w.shape[1], self.block[0]):
                blocks = self._blocks(_to_fp32(w[rows]))
                blocks.mul_(s[self._grid_rows(rows), None, :, None])
                o[rows].copy_(self._unblock(blocks, o[rows]))
        return out

    def encode(self, tensor: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        scale_shape = self.stored_shapes(tuple(tensor.shape))["scale"]
        if scale is not None and tuple(scale.shape) != scale_shape:
            raise StorageError(f"given scales: expected shape {list(scale_shape)}; got {list(scale.shape)}")
        weight = torch.empty(tensor.shape, dtype=FP8)
        out_scale = torch.empty(scale_shape, dtype=torch.float32) if scale is None else scale_to_fp32(scale)
        grids = out_scale.reshape(-1, *scale_shape[-2:])
        for x, s, w in zip(_matrices(tensor), grids, _matrices(weight), strict=True):
            for rows in row_chunks(x.shape[0], x.shape[1], self.block[0]):
                blocks = self._blocks(x[rows].to(torch.float32))
                amax = blocks.abs().amax(dim=(1, 3))
                require_finite(amax, self.name)
                if scale is None:
                    s[self._grid_rows(rows)] = _scale_of(amax, self.scale_rule)
                if scale is None and self.scale_rule == "reciprocal":
                    # The stored scale is a rounded reciprocal of this factor; Transformers multiplies by the factor.
                    blocks *= _where_positive(FP8_MAX / amax, amax)[:, None, :, None]
                else:
                    blocks = _divide(blocks, s[self._grid_rows(rows), None, :, None])
                blocks.clamp_(-FP8_MAX, FP8_MAX)  # PyTorch releases differ in whether the cast saturates
                w[rows].copy_(self._unblock(blocks, w[rows]))
        stored = scale if scale is not None else out_scale.to(_SCALE_DTYPES[self.scale_dtype])
        return {"weight": weight, "scale": stored}

    def _grid_rows(self, rows: slice) -> slice:
        return slice(rows.start // self.block[0], ceil_div(rows.stop, self.block[0]))

    def _blocks(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [n, m], zero-padded, as [n/bn, bn, m/bm, bm]."""
        (n, m), (bn, bm) = matrix.shape, self.block
        if n % bn or m % bm:
            matrix = pad(matrix, (0, -m % bm, 0, -n % bn))
        return matrix.view(ceil_div(n, bn), bn, ceil_div(m, bm), bm)

    def _unblock(self, blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return blocks.flatten(2, 3).flatten(0, 1)[: like.shape[0], : like.shape[1]]


@dataclass(frozen=True, slots=True)
class Fp8Scaled(Codec):
    """`W` [N, M] in E4M3 with one fp32 or bf16 scale a tensor ([], [1] or [1, 1]) or an output channel ([N, 1]).

    Source: compressed-tensors `float-quantized` (`compressors/naive_quantized`, scale in `weight_scale`) and the
    per-tensor form of Transformers' FP8 (scale in `weight_scale_inv`, as Ministral stores it). Value = code * scale.
    """

    strategy: Literal["tensor", "channel"] = "channel"
    scale_suffix: Literal["_scale", "_scale_inv"] = "_scale"
    scale_dtype: Literal["F32", "BF16"] = "F32"

    name = "fp8_scaled"
    suffixes = {"weight": "", "scale": "_scale"}
    discards = (".activation_scale", "_activation_scale", ".input_scale")

    def part_suffixes(self) -> Mapping[str, str]:
        return {"weight": "", "scale": self.scale_suffix}

    def stored_dtypes(self) -> dict[str, str]:
        return {"weight": "F8_E4M3", "scale": self.scale_dtype}

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2:
            raise LayoutError(f"{self.name} needs a matrix; got shape {list(shape)}")
        per_tensor: Shape = () if self.scale_suffix == "_scale_inv" else (1,)
        return {"weight": shape, "scale": (shape[0], 1) if self.strategy == "channel" else per_tensor}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        shape, scale = stored_shapes["weight"], stored_shapes["scale"]
        self.stored_shapes(shape)
        if math.prod(scale) != 1 and scale not in ((shape[0], 1), (shape[0],)):
            raise StorageError(
                f"scales of a {list(shape)} weight: expected one, or shape [{shape[0]}, 1]; got {list(scale)}"
            )
        return shape

    def row_alignment(self, shape: Shape) -> int:
        """1 for decoding; a per-tensor scale is derived from the whole tensor, so encode it whole or give `scale`."""
        return 1

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        return None if math.prod(stored_shapes[role]) == 1 else (start, stop)

    def decode(self, parts: Parts, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        weight = part(parts, "weight", FP8)
        scale = part(parts, "scale", torch.float32, torch.bfloat16, torch.float16)
        self.decoded_shape({"weight": tuple(weight.shape), "scale": tuple(scale.shape)})
        out = torch.empty(weight.shape, dtype=dtype)
        column = scale.to(torch.float32).reshape(-1, 1).expand(weight.shape[0], 1)
        for rows in row_chunks(*weight.shape):
            out[rows].copy_(_to_fp32(weight[rows]).mul_(column[rows]))
        return out

    def encode(self, tensor: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        scale_shape = self.stored_shapes(tuple(tensor.shape))["scale"]
        chunks = list(row_chunks(*tensor.shape))
        amax = torch.cat([tensor[rows].to(torch.float32).abs().amax(dim=1, keepdim=True) for rows in chunks])
        require_finite(amax, self.name)
        if scale is None:
            largest = amax if self.strategy == "channel" else amax.amax()
            # The codes belong to the scale that is stored, so round it first.
            scale = _scale_of(largest, "amax").to(_SCALE_DTYPES[self.scale_dtype]).reshape(scale_shape)
        self.decoded_shape({"weight": tuple(tensor.shape), "scale": tuple(scale.shape)})
        column = scale.to(torch.float32).reshape(-1, 1).expand(tensor.shape[0], 1)
        weight = torch.empty(tensor.shape, dtype=FP8)
        for rows in chunks:
            scaled = _divide(tensor[rows].to(torch.float32), column[rows])
            weight[rows].copy_(scaled.clamp_(-FP8_MAX, FP8_MAX))
        return {"weight": weight, "scale": scale}


_SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}


def _to_fp32(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 as fp32 through a table: torch's own cast is scalar on a CPU, 2.7 ns an element against 0.5."""
    table = torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.float32)
    index = codes.contiguous().view(torch.uint8).flatten().to(torch.int32)
    return table.index_select(0, index).view(codes.shape)


def _scale_of(amax: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """fp32 scale of a block by its largest magnitude; 1 where that is zero or too small for a scale to exist."""
    scale = amax / FP8_MAX if rule == "amax" else 1.0 / (FP8_MAX / amax)
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
