"""MXFP4 expert weights: blocks of 32 E2M1 codes along the input dim with one E8M0 exponent each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.codecs.base import Box, Codec
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.arithmetic.common import Arithmetic

GROUP = 32


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

    @property
    def keeps_scales(self) -> bool:
        """True: a block whose largest code is 3 or less would get a smaller exponent."""
        return True

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

    def grain(self, role: str, shape: Shape) -> Shape:
        return (1, GROUP, 1)

    def part_box(self, role: str, box: Box, shape: Shape) -> Box:
        experts, groups, rows = Codec.part_box(self, role, box, shape)  # a class with slots has no `super`
        return (experts, rows, groups) if role == "scale" else (experts, rows, groups, (0, GROUP // 2))

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.mxfp4 import MXFP4

        return MXFP4
