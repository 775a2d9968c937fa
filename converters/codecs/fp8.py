"""FP8 E4M3 weights with fp32 scales: per block, per output channel or per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from converters.codecs.base import ACTIVATION_SCALES, Codec, aligned, ceil_div
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.arithmetic.common import Arithmetic

ScaleRule = Literal["amax", "reciprocal", "ue8m0"]
#: Safetensors dtypes of stored scales; F8_E8M0 and U8 hold exponents alone.
ScaleDtype = Literal["F32", "F16", "BF16", "F8_E8M0", "U8"]
#: What weights' scales are called; that it is inverted says nothing: codes are multiplied by it under either name.
ScaleSuffix = Literal["_scale_inv", "_scale"]
SCALE_SUFFIXES: tuple[ScaleSuffix, ...] = ("_scale_inv", "_scale")
SCALE_DTYPES: tuple[ScaleDtype, ...] = ("F32", "F16", "BF16", "F8_E8M0", "U8")
#: Elements under one scale from which on keeping the scales costs 1 part in 32 or less.
_MANY = 128


@dataclass(frozen=True, slots=True)
class Fp8Block(Codec):
    """`W` [..., N, M] in E4M3 with `W_scale_inv` [..., ceil(N/bn), ceil(M/bm)]; value = code * scale_inv of its block.

    Source of the format: DeepSeek-V3, `inference/kernel.py` (`weight_dequant`) and its paper, section 3.3
    (arXiv:2412.19437); Qwen3-FP8 and MiniMax-M2 store the same, compressed-tensors (strategy `block`) under
    `W_scale`. Products are formed in fp32 and rounded once, as in
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
    scale_dtype: ScaleDtype = "F32"
    scale_suffix: ScaleSuffix = "_scale_inv"

    name = "fp8_block"
    suffixes = {"weight": "", "scale": "_scale_inv"}
    discards = ACTIVATION_SCALES

    def part_suffixes(self) -> Mapping[str, str]:
        return {"weight": "", "scale": self.scale_suffix}

    @property
    def keeps_scales(self) -> bool:
        """True: bf16 values do not tell an fp32 scale."""
        return self.block[0] * self.block[1] >= _MANY

    def as_stored(self, dtypes: Mapping[str, str], shapes: Mapping[str, Shape]) -> Fp8Block:
        dtype = scale_dtype_of(dtypes)
        return replace(self, scale_dtype=dtype, scale_rule="ue8m0" if dtype in _EXPONENTS else self.scale_rule)

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

    def grain(self, role: str, shape: Shape) -> Shape:
        return (*(1,) * (len(shape) - 2), *((1, 1) if role == "weight" else self.block))

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        alignment = self.row_alignment(stored_shapes["weight"])
        aligned(start, alignment)
        return (start, stop) if role == "weight" else (start // alignment, ceil_div(stop, alignment))

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.fp8 import BLOCK

        return BLOCK


@dataclass(frozen=True, slots=True)
class Fp8Scaled(Codec):
    """`W` [N, M] in E4M3 with one fp32 or bf16 scale a tensor ([], [1] or [1, 1]) or an output channel ([N, 1]).

    Source: compressed-tensors `float-quantized` (`compressors/naive_quantized`, scale in `weight_scale`), the same of
    ModelOpt, fbgemm's by rows (Transformers' `integrations/fbgemm_fp8.py`) and the per-tensor form of Transformers'
    FP8 (scale in `weight_scale_inv`, as Ministral stores it, or `weight_scale`). Value = code * scale.
    """

    strategy: Literal["tensor", "channel"] = "channel"
    scale_suffix: ScaleSuffix = "_scale"
    scale_dtype: ScaleDtype = "F32"

    name = "fp8_scaled"
    suffixes = {"weight": "", "scale": "_scale"}
    discards = ACTIVATION_SCALES
    maxima_role = "scale"

    def part_suffixes(self) -> Mapping[str, str]:
        return {"weight": "", "scale": self.scale_suffix}

    @property
    def keeps_scales(self) -> bool:
        """True: bf16 values do not tell an fp32 scale."""
        return True

    def as_stored(self, dtypes: Mapping[str, str], shapes: Mapping[str, Shape]) -> Fp8Scaled:
        single = math.prod(shapes["scale"]) == 1
        return replace(self, scale_dtype=scale_dtype_of(dtypes), strategy="tensor" if single else "channel")

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

    def encode_alignment(self, shape: Shape) -> int:
        """All rows where they share one scale: it is derived from the whole tensor."""
        return 1 if self.strategy == "channel" else max(1, shape[0])

    def grain(self, role: str, shape: Shape) -> Shape:
        if role == "weight":
            return (1, 1)
        return shape if self.of_all(role) else (1, shape[1])

    def of_all(self, role: str) -> bool:
        return role == "scale" and self.strategy == "tensor"

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        return None if math.prod(stored_shapes[role]) == 1 else (start, stop)

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.fp8 import SCALED

        return SCALED


_EXPONENTS = ("F8_E8M0", "U8")


def scale_dtype_of(dtypes: Mapping[str, str]) -> ScaleDtype:
    """The dtype of the part `scale`; raises StorageError for one that no scale has."""
    for dtype in SCALE_DTYPES:
        if dtypes["scale"] == dtype:
            return dtype
    raise StorageError(f"scales are stored as {dtypes['scale']}; expected {', '.join(SCALE_DTYPES)}")
