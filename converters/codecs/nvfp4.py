"""NVFP4 weights: blocks of 16 E2M1 codes with an E4M3 scale each, and one fp32 scale a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from converters.codecs.base import ACTIVATION_SCALES, Codec
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    import torch

    from converters.codecs.arithmetic.common import Arithmetic, Parts


@dataclass(frozen=True, slots=True)
class Nvfp4(Codec):
    """ModelOpt's: `W` uint8 [out, in/2], the low nibble first, `W_scale` E4M3 [out, in/16], `W_scale_2` fp32 [].

    Value = code * (scale * scale_2), products in fp32, rounded once. Fresh block scales are amax / 6 / scale_2; the
    tensor's own is the source's, else amax / (6 * 448). compressed-tensors' (`inverse`): `W_packed`, `W_scale`, fresh
    0.125 for 0, and `W_global_scale` fp32 [1], by which the block's is divided. Source: NVIDIA Model Optimizer,
    `quantization/qtensor/nvfp4_tensor.py`; compressed-tensors, `compressors/nvfp4/base.py`.
    """

    group: int = 16
    inverse: bool = False
    held: Parts = field(default_factory=dict, compare=False, repr=False)

    name = "nvfp4"
    suffixes = {"codes": "", "scale": "_scale", "whole": "_scale_2"}
    whole_parts = ("whole",)
    maxima_role = "whole"
    discards = ACTIVATION_SCALES
    zero_scale_is_a_fault = False  # blocks far smaller than the tensor's largest round to it

    def part_suffixes(self) -> Mapping[str, str]:
        return {"codes": "_packed", "scale": "_scale", "whole": "_global_scale"} if self.inverse else self.suffixes

    @property
    def constant_parts(self) -> tuple[str, ...]:
        return ("whole",)

    @property
    def keeps_scales(self) -> bool:
        """True: bf16 values do not tell an fp32 scale."""
        return True

    def holding(self, constants: Mapping[str, torch.Tensor]) -> Nvfp4:
        return replace(self, held=dict(constants))

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2 or shape[1] % self.group:
            raise LayoutError(f"nvfp4 needs a matrix with rows of a multiple of {self.group}; got {list(shape)}")
        groups, whole = shape[1] // self.group, (1,) if self.inverse else ()
        return {"codes": (shape[0], shape[1] // 2), "scale": (shape[0], groups), "whole": whole}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        codes, scale = stored_shapes["codes"], stored_shapes["scale"]
        shape = (*codes[:-1], 2 * codes[-1]) if codes else ()
        if len(shape) != 2 or shape[1] % self.group or scale != (shape[0], shape[1] // self.group):
            raise StorageError(
                f"nvfp4 parts: expected codes [out, in/2] and scales [out, in/{self.group}]; got {list(codes)} and "
                f"{list(scale)}",
                hint="check `group_size` in the quantisation config",
            )
        return shape

    def encode_alignment(self, shape: Shape) -> int:
        """All rows: the tensor's own scale may have to be derived."""
        return max(1, shape[0])

    def grain(self, role: str, shape: Shape) -> Shape:
        return shape if role == "whole" else (1, self.group if role == "scale" else 2)

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.nvfp4 import NVFP4

        return NVFP4
