"""compressed-tensors `pack-quantized` INT4 weights: symmetric, in groups of inputs or whole rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.codecs.base import Codec, ScaleDtype, ceil_div, scale_dtype_of
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.arithmetic.common import Arithmetic

CODES_PER_WORD = 8


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
    With `scale=` every group with a non-zero scale comes back bitwise. `group` is None for a scale a row.
    """

    group: int | None = 32
    scale_dtype: ScaleDtype = "BF16"

    name = "int4_packed"
    suffixes = {"packed": "_packed", "scale": "_scale", "shape": "_shape"}
    whole_parts = ("shape",)

    @property
    def keeps_scales(self) -> bool:
        """Whether a scale is of a whole row: then they are few, and its largest code need not be 7 or 8."""
        return self.group is None

    def as_stored(self, dtypes: Mapping[str, str], shapes: Mapping[str, Shape]) -> Int4Packed:
        return replace(self, scale_dtype=scale_dtype_of(dtypes))

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2:
            raise LayoutError(f"{self.name} needs a matrix; got shape {list(shape)}")
        rows, width = shape
        return {
            "packed": (rows, ceil_div(width, CODES_PER_WORD)),
            "scale": (rows, 1 if self.group is None else ceil_div(width, self.group)),
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

    def grain(self, role: str, shape: Shape) -> Shape:
        return (1, {"packed": CODES_PER_WORD, "scale": self.group or shape[1], "shape": 1}[role])

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.int4 import INT4

        return INT4
