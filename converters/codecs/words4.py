"""4-bit weights of GPTQ and AWQ: unsigned codes in 32-bit words, with a scale and a zero a group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from converters.codecs.base import Codec
from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    import torch

    from converters.codecs.arithmetic.common import Arithmetic, Parts

PER_WORD = 8
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Words4(Codec):
    """`X.qweight`, `X.qzeros` and `X.scales` hold `X.weight` [out, in]; stored matrices have the inputs first.

    GPTQ: `qweight` int32 [in/8, out], eight inputs a word, lowest bits first; `qzeros` int32 [groups, out/8], minus
    0x11111111 unless `checkpoint_format` is gptq_v2; `g_idx` int32 [in] names each input's group. AWQ (`order`):
    `qweight` int32 [in, out/8], the eight outputs of a word in the order 0 2 4 6 1 3 5 7; `qzeros` likewise; groups
    are runs of inputs. Value = (code - zero) * scale, in the dtype of the scale, as GPTQModel (`utils/model.py`,
    `convert_gptq_v1_to_v2_format_module`, and `dequantize_weight`) and AutoAWQ (`utils/packing_utils.py`) form it.
    Fresh scales are the least that hold a group about its zero.
    """

    awq: bool = False
    group: int | None = 128
    zero_offset: int = 1
    held: Parts = field(default_factory=dict, compare=False, repr=False)

    name = "words4"
    suffixes = {"codes": ".qweight", "scale": ".scales", "zeros": ".qzeros", "groups": ".g_idx"}
    whole_parts = tuple(suffixes)  # rows lie along the columns of what is stored

    def part_suffixes(self) -> Mapping[str, str]:
        return {role: suffix for role, suffix in self.suffixes.items() if not (self.awq and role == "groups")}

    def part_names(self, logical: str) -> dict[str, str]:
        stem = logical.removesuffix(_WEIGHT)
        return {role: stem + suffix for role, suffix in self.part_suffixes().items()}

    def logical_name(self, stored: str) -> str | None:
        suffix = next((s for s in self.part_suffixes().values() if stored.endswith(s) and stored != s), None)
        return None if suffix is None else stored.removesuffix(suffix) + _WEIGHT

    def decoded_dtype(self, dtypes: Mapping[str, str]) -> str:
        return dtypes["scale"]

    @property
    def constant_parts(self) -> tuple[str, ...]:
        """Zeros, and which group an input is of."""
        return ("zeros",) if self.awq else ("zeros", "groups")

    @property
    def keeps_scales(self) -> bool:
        """True: they are few, and values alone tell neither a zero nor an order of activations."""
        return True

    def holding(self, constants: Mapping[str, torch.Tensor]) -> Words4:
        return replace(self, held=dict(constants))

    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) != 2 or shape[0] % PER_WORD or shape[1] % PER_WORD:
            raise LayoutError(f"4-bit words need a matrix of multiples of {PER_WORD}; got shape {list(shape)}")
        rows, width = shape
        groups = 1 if self.group is None else -(-width // self.group)
        codes = (width, rows // PER_WORD) if self.awq else (width // PER_WORD, rows)
        shapes = {"codes": codes, "scale": (groups, rows), "zeros": (groups, rows // PER_WORD), "groups": (width,)}
        return {role: shapes[role] for role in self.part_suffixes()}

    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        codes = stored_shapes["codes"]
        if len(codes) != 2:
            raise StorageError(f"4-bit words: expected two dims; got shape {list(codes)}")
        shape = (codes[1] * PER_WORD, codes[0]) if self.awq else (codes[1], codes[0] * PER_WORD)
        for role, expected in self.stored_shapes(shape).items():
            if stored_shapes[role] != expected:
                raise StorageError(
                    f"`{self.suffixes[role][1:]}` of a {list(shape)} weight: expected shape {list(expected)}; got "
                    f"{list(stored_shapes[role])}",
                    hint="check `bits` and `group_size` in `quantization_config` of config.json",
                )
        return shape

    def row_alignment(self, shape: Shape) -> int:
        return max(1, shape[0])

    def arithmetic(self) -> Arithmetic:
        from converters.codecs.arithmetic.words4 import WORDS4

        return WORDS4
