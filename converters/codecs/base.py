"""What a codec is: the stored parts of one logical tensor, and the two functions between them.

A plan asks for names, shapes and rows alone, so that these modules import no torch. `decode` and `encode` do, from
`converters.codecs.arithmetic`, when they are called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    import torch

    from converters.codecs.arithmetic.common import Arithmetic, Parts


#: First element and the one behind the last of each dimension.
Box = tuple[tuple[int, int], ...]
ScaleDtype = Literal["BF16", "F16", "F32"]
SCALE_DTYPES: tuple[ScaleDtype, ...] = ("BF16", "F16", "F32")
#: Ends of names that belong to activations, to the cache of keys and values, or to the bounds of such scales.
ACTIVATION_SCALES = (
    ".activation_scale",
    "_activation_scale",
    ".input_scale",
    ".input_scale_ub",
    ".input_global_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".prob_scale",
)


class Codec(ABC):
    """How a checkpoint stores one logical tensor in several parts.

    A part is named by the logical name plus a suffix: `W` is stored as `W + suffixes[role]` for each role.
    Tensors whose name ends in one of `discards` describe activations; decoding has no use for them.

    Laws, for parts `p` of finite values: `decode(encode(decode(p))) == decode(p)` and
    `encode(decode(p), scale=p["scale"]) == p`, both bitwise but for the exceptions each codec names.
    Decoding row slabs that start at multiples of `row_alignment` equals decoding the whole tensor, and encoding slabs
    that start at multiples of `encode_alignment` equals encoding the whole tensor.
    """

    __slots__ = ()

    name: ClassVar[str]
    suffixes: ClassVar[Mapping[str, str]]
    discards: ClassVar[tuple[str, ...]] = ()
    #: Roles of which a slab of rows needs all.
    whole_parts: ClassVar[tuple[str, ...]] = ()
    #: The role whose elements beyond a box the box's largest magnitudes decide, together with those of others.
    maxima_role: ClassVar[str | None] = None
    #: Whether a scale of zero over codes that are not destroys what they stood for; else small blocks have them.
    zero_scale_is_a_fault: ClassVar[bool] = True

    def part_suffixes(self) -> Mapping[str, str]:
        """Suffix of each part by its role; an instance may differ from its class's `suffixes`."""
        return self.suffixes

    def decoded_dtype(self, dtypes: Mapping[str, str]) -> str:
        """safetensors name of the dtype of a decoded tensor, by those of its parts, unless another is asked for.

        Scales of fp16 belong to a model of fp16, whose values bf16 does not hold.
        """
        return "F16" if dtypes.get("scale") == "F16" else "BF16"

    @property
    def encodes(self) -> bool:
        """Whether `encode` is there; some kinds are only read."""
        return True

    def part_names(self, logical: str) -> dict[str, str]:
        """Stored name of each part of the tensor `logical`, by role."""
        return {role: logical + suffix for role, suffix in self.part_suffixes().items()}

    def logical_name(self, stored: str) -> str | None:
        """Logical name that a stored part belongs to, or None when no suffix says that it is a part."""
        for suffix in self.part_suffixes().values():
            if suffix and stored.endswith(suffix) and len(stored) > len(suffix):
                return stored[: -len(suffix)]
        return None

    @property
    def keeps_scales(self) -> bool:
        """Whether a source's scales are worth keeping: the values do not give them back, and they are few."""
        return False

    @property
    def kept_parts(self) -> tuple[str, ...]:
        """Roles that an import keeps for an export that encodes again."""
        return ("scale", *self.constant_parts) if self.keeps_scales else ()

    @property
    def constant_parts(self) -> tuple[str, ...]:
        """Roles that are the source's whatever the values are: zeros, an order of inputs, a scale of scales."""
        return ()

    def holding(self, constants: Mapping[str, torch.Tensor]) -> Codec:
        """This codec with the values of its `constant_parts`, about which it encodes."""
        return self

    def as_stored(self, dtypes: Mapping[str, str], shapes: Mapping[str, Shape]) -> Codec:
        """This codec, set to write parts of the safetensors dtypes and shapes that a source's have."""
        return self

    @abstractmethod
    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Shape `encode` gives each part of a tensor of `shape`; raises LayoutError for a shape it cannot hold."""

    @abstractmethod
    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the logical tensor, from the headers alone; raises StorageError when the parts disagree."""

    def row_alignment(self, shape: Shape) -> int:
        """Slabs of a tensor of decoded `shape` start at multiples of this many rows of dim 0."""
        return 1

    def encode_alignment(self, shape: Shape) -> int:
        """The same for slabs to encode, where a scale may need more rows than a value does."""
        return self.row_alignment(shape)

    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        """Rows of a part that hold the decoded rows [start, stop), or None when the slab needs the whole part."""
        return None if role in self.whole_parts else (start, stop)

    def grain(self, role: str, shape: Shape) -> Shape | None:
        """How many elements of a tensor of `shape`, dim by dim, one element of a part is made of.

        A box that begins and ends at multiples of the grains of all roles, or at the tensor's end, is encoded by
        itself. None where no box is: every part needs the whole tensor.
        """
        return None

    def of_all(self, role: str) -> bool:
        """Whether a part is one for the whole tensor, of whatever shape."""
        return role in self.whole_parts

    def part_box(self, role: str, box: Box, shape: Shape) -> Box:
        """The box of a part that a box of a tensor of `shape` is made into."""
        grain = self.grain(role, shape)
        if grain is None or self.of_all(role):
            return tuple((0, size) for size in self.stored_shapes(shape)[role])
        return tuple((start // size, ceil_div(stop, size)) for (start, stop), size in zip(box, grain, strict=True))

    @abstractmethod
    def arithmetic(self) -> Arithmetic:
        """What computes `decode`, `encode` and `any_by_scale`; imports torch."""

    def decode(self, parts: Parts, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The logical tensor, of `dtype` or bf16, in any strides; its rows when every part is cut by `part_rows`."""
        return self.arithmetic().decode(self, parts, dtype)

    def encode(
        self, tensor: torch.Tensor, *, scale: torch.Tensor | None = None, shape: Shape | None = None
    ) -> dict[str, torch.Tensor]:
        """The parts of a tensor or row slab; `scale` fixes the stored scales instead of deriving them from `tensor`.

        `shape` is that of the whole tensor where `tensor` is a slab: a part may tell it.
        Raises StorageError for NaN or infinite values: a scale derived from them would destroy their block.
        """
        return self.arithmetic().encode(self, tensor, scale, shape)

    def encode_under(self, tensor: torch.Tensor, largest: torch.Tensor, *, shape: Shape) -> dict[str, torch.Tensor]:
        """The parts of a box of a tensor of `shape`, whose part `maxima_role` reaches beyond it.

        `largest`: fp32 magnitudes of all elements under each of that part's, shaped as the box's part.
        """
        found = self.arithmetic().of_largest
        if found is None or self.maxima_role is None:
            raise AssertionError(f"{self.name} has no scale that largest magnitudes decide")
        fixed = found(self, largest)
        if self.maxima_role in self.constant_parts:
            return self.holding({self.maxima_role: fixed}).encode(tensor, shape=shape)
        return self.encode(tensor, scale=fixed, shape=shape)

    def any_by_scale(self, mask: torch.Tensor) -> torch.Tensor:
        """Whether a bool `mask` of the logical shape is set anywhere under each scale; bool, shaped as the scales."""
        return self.arithmetic().any_by_scale(self, mask)


def assemble(codecs: Collection[Codec], stored: Collection[str]) -> dict[str, Codec]:
    """Logical tensors whose parts all stand in `stored`, with their codec.

    Names that complete no tensor are left alone: the ledger reports them as it does any unknown tensor.
    Raises StorageError when two codecs claim one logical name.
    """
    names = frozenset(stored)
    found: dict[str, Codec] = {}
    for codec in codecs:
        for name in stored:  # in its order, which is the same in every process; that of a set is not
            logical = codec.logical_name(name)
            if logical is None or not names.issuperset(codec.part_names(logical).values()):
                continue
            other = found.setdefault(logical, codec)
            if other is not codec:
                raise StorageError(
                    f"`{logical}` is stored twice: its parts fit codec {other.name} and codec {codec.name}",
                    details=sorted({*other.part_names(logical).values(), *codec.part_names(logical).values()}),
                )
    return found


def scale_dtype_of(dtypes: Mapping[str, str]) -> ScaleDtype:
    """The dtype of a source's scales, by those of its parts; StorageError for one that no scale is written in."""
    for dtype in SCALE_DTYPES:
        if dtypes["scale"] == dtype:
            return dtype
    raise StorageError(f"scales are stored as {dtypes['scale']}; expected {', '.join(SCALE_DTYPES)}")


def ceil_div(value: int, by: int) -> int:
    """The least whole number not below `value / by`."""
    return -(-value // by)


def aligned(start: int, alignment: int) -> int:
    """`start`, checked to lie on a row block; raises LayoutError when it does not."""
    if start % alignment:
        raise LayoutError(f"a slab must start at a multiple of {alignment} rows; got row {start}")
    return start
