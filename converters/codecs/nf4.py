"""bitsandbytes' 4-bit weights: codes of a table of 16 values, in blocks with a largest magnitude each; read only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from converters.codecs.base import Codec
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.arithmetic.common import Arithmetic

#: Elements under one largest magnitude, and magnitudes under one of theirs.
BLOCK, NESTED_BLOCK = 64, 256


@dataclass(frozen=True, slots=True)
class Nf4(Codec):
    """`W` uint8, two codes a byte, the high nibble first, row by row; `W.absmax` by blocks of 64, `W.quant_map` [16].

    With `nested`, `W.absmax` is uint8: codes of `W.nested_quant_map` [256] under `W.nested_absmax` by blocks of 256,
    an offset added. `W.quant_state.bitsandbytes__nf4` is JSON with the shape, the dtype and that offset, which is why
    `W` is read as [out, in/2] where that JSON was (`mbx.formats.bitsandbytes`), and flat from a header alone.
    Value = quant_map[code] * absmax in fp32, rounded once. Source: bitsandbytes, `functional.py` (`QuantState`,
    `dequantize_4bit`).
    """

    nested: bool = True
    kind: Literal["nf4", "fp4"] = "nf4"
    dtype: Literal["BF16", "F16", "F32"] = "BF16"

    name = "nf4"
    whole_parts = ("codes", "absmax", "map", "nested", "nested_map", "state")  # blocks go on over the ends of rows

    def part_suffixes(self) -> Mapping[str, str]:
        parts = {"codes": "", "absmax": ".absmax", "map": ".quant_map"}
        if self.nested:
            parts |= {"nested": ".nested_absmax", "nested_map": ".nested_quant_map"}
        return {**parts, "state": f".quant_state.bitsandbytes__{self.kind}"}

    def decoded_dtype(self, dtypes: Mapping[str, str]) -> str:
        return self.dtype

    @property
    def encodes(self) -> bool:
        return False

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        raise LayoutError(f"{self.name} is read and not written")

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        codes, absmax = stored_shapes["codes"], stored_shapes["absmax"]
        elements = 2 * math.prod(codes)
        if absmax != (-(-elements // BLOCK),):
            raise StorageError(f"{elements} codes in blocks of {BLOCK}: {list(absmax)} magnitudes do not fit")
        return (elements,) if len(codes) != 2 or codes[1] == 1 else (codes[0], 2 * codes[1])

    def row_alignment(self, shape: Shape) -> int:
        return max(1, shape[0])

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.nf4 import NF4

        return NF4
