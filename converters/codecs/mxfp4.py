"""MXFP4 expert weights: blocks of 32 E2M1 codes along the input dim with one E8M0 exponent each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from converters.codecs.base import (
    Codec,
    Parts,
    pack_nibbles,
    part,
    require_finite,
    row_chunks,
    unpack_nibbles,
)
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

GROUP = 32
EXPONENT_BIAS = 127
LARGEST_EXPONENT = 254  # 255 stands for NaN

#: E2M1 magnitudes by their low three bits; bit 3 is the sign (OCP Microscaling Formats v1.0, table 5.3.3).
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4(Codec):
    """GPT-OSS experts: `W_blocks` uint8 [E, out, G, 16] and `W_scales` uint8 [E, out, G] hold `W` [E, in, out].

    in = 32 * G; a byte holds two codes, the low nibble first; value = code * 2 ** (scale - 127). The logical tensor is
    transposed against the stored one: it is what Transformers names `W` (`integrations/mxfp4.py`,
    `convert_moe_packed_tensors`), input dim first.

    `encode` takes the least exponent that needs no saturation, ceil(log2(amax / 6)). It gives back stored parts
    bitwise where a block's largest code is 4 or 6; other blocks return the same values under a smaller exponent, and
    all-zero blocks get scale 0. With `scale=` every block of finite values comes back bitwise. A scale of 255, NaN in
    the standard, is read as 2 ** 128 as Transformers does; `scale_faults` reports it.
    """

    name = "mxfp4"
    suffixes = {"blocks": "_blocks", "scale": "_scales"}

    def stored_dtypes(self) -> dict[str, str]:
        return {"blocks": "U8", "scale": "U8"}

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 3 or shape[1] % GROUP:
            raise LayoutError(f"mxfp4 needs [experts, in, out] with `in` a multiple of {GROUP}; got {list(shape)}")
        experts, width, rows = shape
        return {"blocks": (experts, rows, width // GROUP, GROUP // 2), "scale": (experts, rows, width // GROUP)}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        blocks, scale = stored_shapes["blocks"], stored_shapes["scale"]
        if len(blocks) != 4 or blocks[3] != GROUP // 2 or blocks[:3] != scale:
            raise StorageError(
                "mxfp4 parts: expected blocks [experts, out, groups, 16] and scales [experts, out, groups]; "
                f"got {list(blocks)} and {list(scale)}"
            )
        return (blocks[0], blocks[2] * GROUP, blocks[1])

    def row_alignment(self, shape: Shape) -> int:
        """1: the rows of the logical tensor are whole experts."""
        return 1

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        return (start, stop)

    def decode(self, parts: Parts, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        blocks, scale = part(parts, "blocks", torch.uint8), part(parts, "scale", torch.uint8)
        shape = self.decoded_shape({"blocks": tuple(blocks.shape), "scale": tuple(scale.shape)})
        doubled = 2 * torch.tensor(MAGNITUDES + tuple(-v for v in MAGNITUDES), dtype=dtype)
        factors = _half_factors(dtype)
        out = torch.empty(shape, dtype=dtype)
        for expert in range(shape[0]):
            for rows in row_chunks(shape[2], shape[1]):
                tile = unpack_nibbles(blocks[expert, rows], doubled)
                factor = factors.index_select(0, scale[expert, rows].flatten().to(torch.int32))
                tile.mul_(factor.view(*tile.shape[:-1], 1))
                # Transposing into its own tile first: straight into strided rows is five times slower.
                out[expert, :, rows].copy_(tile.flatten(1).T.contiguous())
        return out

    def encode(self, tensor: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        shapes = self.stored_shapes(tuple(tensor.shape))
        if scale is not None and tuple(scale.shape) != shapes["scale"]:
            raise StorageError(f"given scales: expected shape {list(shapes['scale'])}; got {list(scale.shape)}")
        blocks = torch.empty(shapes["blocks"], dtype=torch.uint8)
        scales = torch.empty(shapes["scale"], dtype=torch.uint8) if scale is None else scale
        for expert in range(tensor.shape[0]):
            for rows in row_chunks(tensor.shape[2], tensor.shape[1]):
                groups = tensor[expert, :, rows].contiguous().T.contiguous().to(torch.float32)
                groups = groups.reshape(groups.shape[0], -1, GROUP)
                amax = groups.abs().amax(dim=-1)
                require_finite(amax, self.name)
                if scale is None:
                    scales[expert, rows] = _exponents_of(amax)
                blocks[expert, rows] = pack_nibbles(_codes(groups, scales[expert, rows]))
        return {"blocks": blocks, "scale": scales}


def _half_factors(dtype: torch.dtype) -> torch.Tensor:
    """[256] values 2 ** (scale - 128) by stored scale: half the true factor, so that 2 ** 128 needs no infinity."""
    return torch.ldexp(torch.ones(256), torch.arange(256) - EXPONENT_BIAS - 1).to(dtype)


def _exponents_of(amax: torch.Tensor) -> torch.Tensor:
    """Biased exponents ceil(log2(amax / 6)) + 127 as uint8, 0 for zero blocks; frexp is exact where log2 is not."""
    mantissa, exponent = torch.frexp(amax / MAGNITUDES[-1])
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent) + EXPONENT_BIAS
    return torch.where(amax > 0, exponent, torch.zeros_like(exponent)).clamp(0, LARGEST_EXPONENT).to(torch.uint8)


def _codes(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 codes, uint8 [n, g, 32], ties to even, saturated; groups: fp32 [n, g, 32], scales: uint8 [n, g]."""
    scaled = groups / _half_factors(torch.float32)[scales.long()].unsqueeze(-1) / 2
    size = scaled.abs().clamp_(max=MAGNITUDES[-1])
    # Steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6. `round` breaks ties to even, and even codes have even steps.
    coarse = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    codes = torch.where(size < 2, (size * 2).round_(), coarse).to(torch.uint8)
    return codes | (torch.signbit(scaled).to(torch.uint8) << 3)
