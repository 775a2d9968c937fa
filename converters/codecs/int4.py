"""compressed-tensors `pack-quantized` INT4 weights: symmetric, grouped along the input dim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from converters.codecs.base import (
    Codec,
    Parts,
    ceil_div,
    pack_nibbles,
    part,
    require_finite,
    row_chunks,
    unpack_nibbles,
)
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

CODES_PER_WORD = 8
ZERO = 8  # the nibble that stands for 0: codes are stored plus 8
PROBE = 4  # elements of a group that are tried before all of them

_SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Int4Packed(Codec):
    """`W_packed` int32 [out, ceil(in/8)], `W_scale` [out, ceil(in/group)], `W_shape` int64 [2] hold `W` [out, in].

    Element 8*j+i of a row is bits 4i..4i+3 of word j, stored plus 8; value = (nibble - 8) * scale of its group, in the
    dtype of the scale. Source: compressed-tensors, `compressors/pack_quantized/{base,helpers}.py` and
    `quantization/lifecycle/forward.py` (`_dequantize`); Kimi-K2-Thinking stores its experts so, in groups of 32.

    `encode` first looks for a scale under which the group is exactly 4-bit, trying amax / k for k = 8 .. 1 and the
    neighbouring values of the scale's dtype; decoded tensors thus come back with the same values, and bitwise in their
    parts where the group's largest code is 8 or 7 (but for a group of only 0 and -7, which is read as 0 and -8). Other
    groups get amax / 7.5, rounded half to even and clamped to [-8, 7] (compressed-tensors, `calculate_qparams`).
    With `scale=` every group with a non-zero scale comes back bitwise.
    """

    group: int = 32
    scale_dtype: Literal["BF16", "F16", "F32"] = "BF16"

    name = "int4_packed"
    suffixes = {"packed": "_packed", "scale": "_scale", "shape": "_shape"}

    def stored_dtypes(self) -> dict[str, str]:
        return {"packed": "I32", "scale": self.scale_dtype, "shape": "I64"}

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2:
            raise LayoutError(f"{self.name} needs a matrix; got shape {list(shape)}")
        rows, width = shape
        return {
            "packed": (rows, ceil_div(width, CODES_PER_WORD)),
            "scale": (rows, ceil_div(width, self.group)),
            "shape": (2,),
        }

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        """[out, in] with `in` = 8 * words, exact where `in` is a multiple of 8; else `W_shape` has the true width."""
        packed, scale = stored_shapes["packed"], stored_shapes["scale"]
        if len(packed) != 2:
            raise StorageError(f"packed INT4 weight: expected two dims; got shape {list(packed)}")
        shape = (packed[0], packed[1] * CODES_PER_WORD)
        expected = self.stored_shapes(shape)["scale"]
        if scale != expected:
            raise StorageError(
                f"scales of packed INT4 rows {list(shape)} in groups of {self.group}: "
                f"expected shape {list(expected)}; got {list(scale)}",
                hint="check `group_size` in `quantization_config` of config.json",
            )
        return shape

    def row_alignment(self, shape: Shape) -> int:
        return 1

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        return None if role == "shape" else (start, stop)

    def decode(self, parts: Parts, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        packed = part(parts, "packed", torch.int32)
        scale = part(parts, "scale", *_SCALE_DTYPES.values())
        full = self.decoded_shape({"packed": tuple(packed.shape), "scale": tuple(scale.shape)})
        declared = [int(n) for n in part(parts, "shape", torch.int64, torch.int32)]
        if len(declared) != 2 or ceil_div(declared[1], CODES_PER_WORD) != packed.shape[1] or declared[0] < full[0]:
            raise StorageError(f"`weight_shape` says {declared}; the packed words hold {list(full)}")
        width = declared[1]
        values = torch.arange(-ZERO, ZERO).to(scale.dtype)
        out = torch.empty((full[0], width), dtype=dtype)
        for rows in row_chunks(*full):
            # Little-endian words: their bytes, low nibble first, are the elements in order.
            chunk = unpack_nibbles(packed[rows].contiguous().view(torch.uint8), values)
            groups = _groups(chunk, self.group)
            out[rows].copy_((groups * scale[rows].unsqueeze(-1)).flatten(1)[:, :width])
        return out

    def encode(self, tensor: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        shapes = self.stored_shapes(tuple(tensor.shape))
        if scale is not None and tuple(scale.shape) != shapes["scale"]:
            raise StorageError(f"given scales: expected shape {list(shapes['scale'])}; got {list(scale.shape)}")
        width = tensor.shape[1]
        packed = torch.empty(shapes["packed"], dtype=torch.int32)
        dtype = _SCALE_DTYPES[self.scale_dtype]
        scales = torch.empty(shapes["scale"], dtype=dtype) if scale is None else scale
        for rows in row_chunks(*tensor.shape):
            groups = _groups(tensor[rows].to(torch.float32), self.group)
            require_finite(groups.abs().amax(dim=-1), self.name)
            if scale is None:
                scales[rows] = _scales_of(groups, dtype)
            divisor = scales[rows].to(torch.float32).unsqueeze(-1)
            divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
            codes = (groups / divisor).round_().clamp_(-ZERO, ZERO - 1).flatten(1)[:, :width].to(torch.int8)
            nibbles = pad((codes + ZERO).to(torch.uint8), (0, -width % CODES_PER_WORD))
            packed[rows] = pack_nibbles(nibbles).view(torch.int32)
        return {"packed": packed, "scale": scales, "shape": torch.tensor(tensor.shape, dtype=torch.int64)}


def _groups(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """[n, m], zero-padded, as [n, ceil(m/group), group]."""
    return pad(matrix, (0, -matrix.shape[1] % group)).reshape(matrix.shape[0], -1, group)


def _scales_of(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale [n, g] of each group [n, g, group] of fp32 values: one that is exact if there is one, else amax / 7.5."""
    flat = groups.flatten(0, 1)
    amax = flat.abs().amax(dim=-1)
    scales = (amax / 7.5).clamp(min=torch.finfo(torch.float32).eps).to(dtype)
    # Groups still without an exact scale. A group of zeros needs none.
    pending = torch.nonzero(amax > 0).flatten()
    # Ordinary weights fail on their first elements; only survivors are worth a full look.
    probe = flat[:, :PROBE].contiguous()[pending]
    for k in range(ZERO, 0, -1):
        nearest = (amax / k).to(dtype)
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
    step = scale.to(torch.float32).unsqueeze(-1)
    codes = (values / torch.where(step == 0, torch.ones_like(step), step)).round_()
    decoded = (codes.to(scale.dtype) * scale.unsqueeze(-1)).to(torch.float32)
    in_range = (codes >= -ZERO) & (codes < ZERO)
    return ((decoded == values) & in_range).all(dim=-1)
