"""What the arithmetic of every codec needs: chunks of rows, checks of parts and scales, nibbles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from converters.errors import StorageError
from converters.tensors import Shape

Parts = Mapping[str, torch.Tensor]


class Arithmetic(NamedTuple):
    """What computes a codec, function by function as `Codec` has it; each takes the codec first.

    `of_largest` makes the part `maxima_role` of fp32 largest magnitudes, shaped as the part.
    """

    decode: Callable[[Any, Parts, torch.dtype | None], torch.Tensor]
    encode: Callable[[Any, torch.Tensor, torch.Tensor | None, Shape | None], dict[str, torch.Tensor]]
    any_by_scale: Callable[[Any, torch.Tensor], torch.Tensor]
    of_largest: Callable[[Any, torch.Tensor], torch.Tensor] | None = None


#: Elements a codec works on at a time: 256 Ki are 1 MiB of fp32 scratch, which stays in a core's own cache, and which
#: the allocator keeps. With 1 Mi it asks the kernel for fresh pages each time: FP8 took 4.6 ns an element, not 1.0.
CHUNK_ELEMENTS = 1 << 18
#: The same on a GPU, which kernels have to fill: 128 MiB of fp32 scratch.
DEVICE_ELEMENTS = 1 << 25
#: Below this no block of MXFP8 or MXFP4 has a code that stands for 2 ** 128.
_NEAR_INFINITY = 1.5 * 2.0**127


def row_chunks(
    num_rows: int, row_elements: int, alignment: int = 1, elements: int = CHUNK_ELEMENTS
) -> Iterator[slice]:
    """Consecutive row ranges of about so many elements, cut at multiples of `alignment`."""
    step = max(1, elements // max(1, row_elements * alignment)) * alignment
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def chunks_of(matrix: torch.Tensor, alignment: int = 1) -> Iterator[slice]:
    """Row ranges of a matrix [n, m], as large as its device likes them."""
    elements = CHUNK_ELEMENTS if matrix.device.type == "cpu" else DEVICE_ELEMENTS
    return row_chunks(matrix.shape[0], matrix.shape[1], alignment, elements)


def part(parts: Parts, role: str, *dtypes: torch.dtype) -> torch.Tensor:
    """The part of a role; raises StorageError when it is missing or has none of `dtypes`."""
    if role not in parts:
        raise StorageError(f"expected a part `{role}`; got {', '.join(sorted(parts)) or 'none'}")
    tensor = parts[role]
    if dtypes and tensor.dtype not in dtypes:
        raise StorageError(f"part `{role}`: expected {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    return tensor


def check_given(scale: torch.Tensor | None, shape: Shape) -> None:
    """Raise StorageError for given scales that are not of `shape`."""
    if scale is not None and tuple(scale.shape) != shape:
        raise StorageError(f"given scales: expected shape {list(shape)}; got {list(scale.shape)}")


def require_finite(amax: torch.Tensor, codec: str) -> None:
    """Raise StorageError unless each block's largest magnitude is finite."""
    bad = int((~torch.isfinite(amax)).sum())
    if bad:
        raise StorageError(
            f"{bad} of {amax.numel()} blocks hold NaN or infinite values; {codec} cannot store them",
            hint="write the tensor without a codec, or find where the values became non-finite",
        )


def near_infinity(amax: torch.Tensor) -> bool:
    """Whether a block's largest magnitude, fp32, may round to a code that stands for 2 ** 128."""
    return bool((amax >= _NEAR_INFINITY).any())


def require_no_overflow(decoded: torch.Tensor, codec: str) -> None:
    """Raise StorageError where finite values were rounded to codes that are read back as infinite."""
    if bad := int(torch.isinf(decoded).sum()):
        raise StorageError(
            f"{bad} finite values are so near the largest of bf16 that {codec} would round them to infinity",
            hint="write the tensor without a codec, or find where the values became so large",
        )


def scale_faults(scale: torch.Tensor) -> dict[str, int]:
    """How many scales are NaN, infinite, zero or negative; empty when all are positive and finite.

    Decoding follows Transformers, which multiplies by whatever is stored: a zero scale gives zeros, a NaN gives NaN.
    """
    s = scale_to_fp32(scale)
    if bool(((s > 0) & (s < torch.inf)).all()):
        return {}
    counts = {
        "NaN": int(torch.isnan(s).sum()),
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


def as_scales(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """fp32 values in the safetensors dtype of stored scales; U8 holds E8M0 exponents."""
    if dtype == "U8":
        return values.to(torch.float8_e8m0fnu).view(torch.uint8)
    return values.to(_SCALE_DTYPES[dtype])


_SCALE_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def in_groups(matrix: torch.Tensor, group: int | None) -> torch.Tensor:
    """[n, m], zero-padded, as [n, ceil(m/group), group]; one group a row where `group` is None."""
    group = group or matrix.shape[1]
    return pad(matrix, (0, -matrix.shape[1] % group)).reshape(matrix.shape[0], -1, group)


def any_in_groups(codec: Any, mask: torch.Tensor) -> torch.Tensor:
    """`any_by_scale` of a codec whose scales are of a row's groups, by its `group`."""
    return in_groups(mask, codec.group).any(dim=-1)


def over(values: torch.Tensor, by: float) -> torch.Tensor:
    """fp32 values divided by a number: as a tensor, for a GPU multiplies by the reciprocal of a number, which rounds
    otherwise."""
    return values / torch.full_like(values, by)


def divisors(scale: torch.Tensor) -> torch.Tensor:
    """Stored scales as fp32 to divide by, 1 for a zero."""
    found = scale.to(torch.float32)
    return torch.where(found == 0, torch.ones_like(found), found)


def unpack_nibbles(packed: torch.Tensor, values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Look up two 4-bit codes a byte, the low nibble first, in `out` (contiguous) where it is given.

    packed: uint8 [..., B], values: [16] of a 2- or 4-byte dtype; result [..., 2*B] of the dtype of `values`.
    One table of 256 value pairs, read as single integers, makes this one gather: 0.4 ns a byte on one core against
    3.8 for two gathers into strided halves.
    """
    byte = torch.arange(256, device=packed.device)
    values = values.to(packed.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
    pair_dtype = torch.int32 if values.element_size() == 2 else torch.int64
    if out is None:
        out = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=values.dtype, device=packed.device)
    codes = packed.flatten().to(torch.int32)
    torch.index_select(pairs.view(pair_dtype).flatten(), 0, codes, out=out.view(pair_dtype).view(-1))
    return out


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the low nibble first; codes: uint8 [..., 2*B] below 16, result uint8 [..., B]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
