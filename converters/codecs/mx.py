"""MXFP8 and MXFP4 matrices: blocks of 32 codes along a row, with one E8M0 exponent each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from converters.codecs.base import ACTIVATION_SCALES, Codec
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.arithmetic.common import Arithmetic

GROUP = 32


class _Mx(Codec):
    """`W` [out, in] as codes, so many a byte, and `W_scale` uint8 [out, in/32]; value = code * 2 ** (scale - 127).

    Products are exact in bf16. A fresh exponent is compressed-tensors' (`quantization/utils/mxfp_utils.py`,
    `generate_mx_scales`), whose form this is: that of the block's largest magnitude less `offset`, floor(log2) of the
    largest code, and one more from a mantissa of 1.75 on. E4M3 codes then never saturate, E2M1 those between 6 and 7.
    The standard's example never adds one (OCP Microscaling Formats v1.0, 6.3); Transformer Engine and Model Optimizer
    take the least exponent under which nothing saturates. Readers take any. Blocks of zeros get exponent 0. Values so
    near bf16's largest that their codes stand for infinity are refused; that tool's exponent for them is the NaN's.
    """

    __slots__ = ()
    group: ClassVar[int] = GROUP
    offset: ClassVar[int]
    per_byte: ClassVar[int]
    discards = ACTIVATION_SCALES

    @property
    def keeps_scales(self) -> bool:
        """True: a block of MXFP8 whose largest code is 448 would get the next exponent, under which its smallest codes
        are lost, and others' encoders choose otherwise."""
        return True

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2 or shape[1] % GROUP:
            raise LayoutError(f"{self.name} needs a matrix with rows of a multiple of {GROUP}; got {list(shape)}")
        rows, width = shape
        return {"codes": (rows, width // self.per_byte), "scale": (rows, width // GROUP)}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        codes, scale = stored_shapes["codes"], stored_shapes["scale"]
        shape = (*codes[:-1], self.per_byte * codes[-1]) if codes else ()
        if len(shape) != 2 or shape[1] % GROUP or scale != (shape[0], shape[1] // GROUP):
            raise StorageError(
                f"{self.name} parts: expected codes of a matrix and scales [out, in/{GROUP}]; got {list(codes)} and "
                f"{list(scale)}"
            )
        return shape

    def grain(self, role: str, shape: Shape) -> Shape:
        return (1, GROUP if role == "scale" else self.per_byte)

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.mx import MX

        return MX


@dataclass(frozen=True, slots=True)
class Mxfp8(_Mx):
    """`W` E4M3 [out, in]: compressed-tensors' `mxfp8-quantized` (`compressors/mxfp8/base.py`), ModelOpt's MXFP8."""

    name = "mxfp8"
    suffixes = {"codes": "", "scale": "_scale"}
    offset = 8
    per_byte = 1


@dataclass(frozen=True, slots=True)
class Mxfp4Packed(_Mx):
    """`W_packed` uint8 [out, in/2], two E2M1 codes a byte, the low nibble first: compressed-tensors'
    `mxfp4-pack-quantized` (`compressors/mxfp4/base.py`)."""

    name = "mxfp4_packed"
    suffixes = {"codes": "_packed", "scale": "_scale"}
    offset = 2
    per_byte = 2
