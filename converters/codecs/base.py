"""What a codec is: the stored parts of one logical tensor, and the two functions between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import torch

from converters.errors import LayoutError, StorageError
from converters.tensors import Shape

Parts = Mapping[str, torch.Tensor]

#: Elements a codec works on at a time: 1 Mi elements are 4 MiB of fp32 scratch, which stays near the caches.
CHUNK_ELEMENTS = 1 << 20


class Codec(ABC):
    """How a checkpoint stores one logical tensor in several parts.

    A part is named by the logical name plus a suffix: `W` is stored as `W + suffixes[role]` for each role.
    Tensors whose name ends in one of `discards` describe activations; decoding has no use for them.

    Laws, for parts `p` of finite values: `decode(encode(decode(p))) == decode(p)` and
    `encode(decode(p), scale=p["scale"]) == p`, both bitwise but for the exceptions each codec names.
    Decoding row slabs that start at multiples of `row_alignment` equals decoding the whole tensor.
    """

    __slots__ = ()

    name: ClassVar[str]
    suffixes: ClassVar[Mapping[str, str]]
    discards: ClassVar[tuple[str, ...]] = ()
    #: safetensors name of the dtype a decoded tensor has unless another is asked for.
    decoded_dtype: ClassVar[str] = "BF16"

    def part_suffixes(self) -> Mapping[str, str]:
        """Suffix of each part by its role; an instance may differ from its class's `suffixes`."""
        return self.suffixes

    def part_names(self, logical: str) -> dict[str, str]:
        """Stored name of each part of the tensor `logical`, by role."""
        return {role: logical + suffix for role, suffix in self.part_suffixes().items()}

    def logical_name(self, stored: str) -> str | None:
        """Logical name that a stored part belongs to, or None when no suffix says that it is a part."""
        for suffix in self.part_suffixes().values():
            if suffix and stored.endswith(suffix) and len(stored) > len(suffix):
                return stored[: -len(suffix)]
        return None

    def is_discarded(self, stored: str) -> bool:
        """Whether `stored` is an activation scale that a decoded checkpoint does not carry."""
        return stored.endswith(self.discards) if self.discards else False

    @abstractmethod
    def stored_dtypes(self) -> dict[str, str]:
        """The safetensors dtype name `encode` gives each part."""

    @abstractmethod
    def stored_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Shape `encode` gives each part of a tensor of `shape`; raises LayoutError for a shape it cannot hold."""

    @abstractmethod
    def decoded_shape(self, stored_shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the logical tensor, from the headers alone; raises StorageError when the parts disagree."""

    @abstractmethod
    def row_alignment(self, shape: Shape) -> int:
        """Slabs of a tensor of decoded `shape` start at multiples of this many rows of dim 0."""

    @abstractmethod
    def part_rows(
        self, role: str, start: int, stop: int, stored_shapes: Mapping[str, Shape]
    ) -> tuple[int, int] | None:
        """Rows of a part that hold the decoded rows [start, stop), or None when the slab needs the whole part."""

    @abstractmethod
    def decode(self, parts: Parts, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The logical tensor, or its rows when every part is cut by `part_rows`; the result is contiguous."""

    @abstractmethod
    def encode(self, tensor: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The parts of a tensor or row slab; `scale` fixes the stored scales instead of deriving them from `tensor`.

        Raises StorageError for NaN or infinite values: a scale derived from them would destroy their block.
        """


def assemble(codecs: Collection[Codec], stored: Collection[str]) -> dict[str, Codec]:
    """Logical tensors whose parts all stand in `stored`, with their codec.

    Names that complete no tensor are left alone: the ledger reports them as it does any unknown tensor.
    Raises StorageError when two codecs claim one logical name.
    """
    names = frozenset(stored)
    found: dict[str, Codec] = {}
    for codec in codecs:
        for name in names:
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


def ceil_div(value: int, by: int) -> int:
    """The least whole number not below `value / by`."""
    return -(-value // by)


def aligned(start: int, alignment: int) -> int:
    """`start`, checked to lie on a row block; raises LayoutError when it does not."""
    if start % alignment:
        raise LayoutError(f"a slab must start at a multiple of {alignment} rows; got row {start}")
    return start


def row_chunks(num_rows: int, row_elements: int, alignment: int = 1) -> Iterator[slice]:
    """Consecutive row ranges of about CHUNK_ELEMENTS elements, cut at multiples of `alignment`."""
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements * alignment)) * alignment
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def part(parts: Parts, role: str, *dtypes: torch.dtype) -> torch.Tensor:
    """The part of a role; raises StorageError when it is missing or has none of `dtypes`."""
    if role not in parts:
        raise StorageError(f"expected a part `{role}`; got {', '.join(sorted(parts)) or 'none'}")
    tensor = parts[role]
    if dtypes and tensor.dtype not in dtypes:
        raise StorageError(f"part `{role}`: expected {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    return tensor


def require_finite(amax: torch.Tensor, codec: str) -> None:
    """Raise StorageError unless each block's largest magnitude is finite."""
    bad = int((~torch.isfinite(amax)).sum())
    if bad:
        raise StorageError(
            f"{bad} of {amax.numel()} blocks hold NaN or infinite values; {codec} cannot store them",
            hint="write the tensor without a codec, or find where the values became non-finite",
        )


def scale_faults(scale: torch.Tensor) -> dict[str, int]:
    """How many scales are NaN, infinite, zero or negative; empty when all are positive and finite.

    Decoding follows Transformers, which multiplies by whatever is stored: a zero scale gives zeros, a NaN gives NaN.
    """
    s = scale_to_fp32(scale)
    counts = {
        "nan": int(torch.isnan(s).sum()),
        "infinite": int(torch.isinf(s).sum()),
        "zero": int((s == 0).sum()),
        "negative": int((s < 0).sum()),
    }
    return {kind: count for kind, count in counts.items() if count}


def scale_to_fp32(scale: torch.Tensor) -> torch.Tensor:
    """Stored scales as fp32; uint8 holds E8M0 exponents, `2 ** (byte - 127)`, 255 being NaN (OCP MX v1.0, 5.4.1)."""
    if scale.dtype == torch.uint8:
        return scale.view(torch.float8_e8m0fnu).to(torch.float32)
    return scale.to(torch.float32)


def unpack_nibbles(packed: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Look up two 4-bit codes a byte, the low nibble first.

    packed: uint8 [..., B], values: [16] of a 2- or 4-byte dtype; result [..., 2*B] of the dtype of `values`.
    One table of 256 value pairs, read as single integers, makes this one gather: 0.4 ns a byte on one core against
    3.8 for two gathers into strided halves.
    """
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
    pair_dtype = torch.int32 if values.element_size() == 2 else torch.int64
    wide = pairs.view(pair_dtype).flatten().index_select(0, packed.flatten().to(torch.int32))
    return wide.view(values.dtype).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the low nibble first; codes: uint8 [..., 2*B] below 16, result uint8 [..., B]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
