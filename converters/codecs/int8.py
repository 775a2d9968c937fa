"""INT8 weights with a scale a row or a group of columns: stored as they are, or four to a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.codecs.base import Codec, ScaleDtype, ceil_div, scale_dtype_of
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.arithmetic.common import Arithmetic

BYTES_PER_WORD = 4


@dataclass(frozen=True, slots=True)
class Int8(Codec):
    """compressed-tensors INT8, symmetric: codes and `W_scale` [out, 1 or in/group].

    Codes are `W` int8 [out, in] (`int-quantized`), or `W_packed` int32 [out, ceil(in/4)] with `W_shape` int64 [2]
    (`pack-quantized`, plus 128, the lowest byte first). Value = code * scale, in the scale's dtype. `group` None is
    a scale a row. Fresh scales are amax / 127.5 (`calculate_qparams`). Source: compressed-tensors,
    `compressors/pack_quantized/helpers.py` and `quantization/lifecycle/forward.py` (`_dequantize`).
    """

    packed: bool = False
    group: int | None = None
    scale_dtype: ScaleDtype = "BF16"

    name = "int8"
    suffixes = {"codes": "", "scale": "_scale"}
    whole_parts = ("shape",)
    maxima_role = "scale"

    def part_suffixes(self) -> Mapping[str, str]:
        return {"codes": "_packed", "scale": "_scale", "shape": "_shape"} if self.packed else self.suffixes

    @property
    def keeps_scales(self) -> bool:
        """True: rounded values do not tell a scale whose largest code is unknown."""
        return True

    def as_stored(self, dtypes: Mapping[str, str], shapes: Mapping[str, Shape]) -> Int8:
        return replace(self, scale_dtype=scale_dtype_of(dtypes))

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2:
            raise LayoutError(f"{self.name} needs a matrix; got shape {list(shape)}")
        rows, width = shape
        scale = (rows, 1 if self.group is None else ceil_div(width, self.group))
        if not self.packed:
            return {"codes": shape, "scale": scale}
        return {"codes": (rows, ceil_div(width, BYTES_PER_WORD)), "scale": scale, "shape": (2,)}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        """[out, in] with `in` = 4 * words of packed codes; else `W_shape` has the true width."""
        codes, scale = stored_shapes["codes"], stored_shapes["scale"]
        if len(codes) != 2:
            raise StorageError(f"INT8 weight: expected two dims; got shape {list(codes)}")
        shape = (codes[0], codes[1] * (BYTES_PER_WORD if self.packed else 1))
        expected = self.stored_shapes(shape)["scale"]
        if scale not in (expected, expected[:1]):
            raise StorageError(
                f"scales of INT8 rows {list(shape)}: expected shape {list(expected)}; got {list(scale)}",
                hint="check `strategy` and `group_size` in `quantization_config` of config.json",
            )
        return shape

    def grain(self, role: str, shape: Shape) -> Shape:
        codes = BYTES_PER_WORD if self.packed else 1
        return (1, {"codes": codes, "scale": self.group or shape[1], "shape": 1}[role])

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.int8 import INT8

        return INT8
