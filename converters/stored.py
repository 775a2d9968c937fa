"""The one reader of stored tensors: any box of a global tensor, whatever chunks tile it, as bytes in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError
from converters.protocols import Source
from converters.tensors import DTYPE_BITS, Chunk, Shape, StoredTensor

Bytes = npt.NDArray[np.uint8]
#: The most that is read around what is wanted, in one call.
STRIP_BYTES = 4 << 20
#: Runs no further apart are read in one call, and what lies between them with them: a call costs more.
_NEAR_BYTES = 64 << 10


def read_box(tensor: StoredTensor, source: Source, offsets: Shape, sizes: Shape) -> Bytes:
    """The box of `sizes` from `offsets` on, in elements of the global tensor: [*sizes, bytes of an element].

    Allocates the box, and beside it at most a strip of 4 MiB; reads no row twice, and none that the box does not
    touch. Raises StorageError where bytes are not stored.
    """
    out = np.empty((*sizes, DTYPE_BITS[tensor.dtype] // 8), np.uint8)
    fill_box(tensor, source, offsets, out)
    return out


def read_rows(tensor: StoredTensor, source: Source, index: Shape, row: int, rows: int) -> Bytes:
    """Rows `[row, row + rows)` of the entry at `index` of the leading dimensions: [rows, bytes of a row]."""
    out = read_box(tensor, source, *box_of_rows(tensor.shape, index, row, rows))
    return out.reshape(rows, math.prod(out.shape[len(index) + 1 : -1]) * out.shape[-1])


def box_of_rows(shape: Shape, index: Shape, row: int, rows: int) -> tuple[Shape, Shape]:
    """Offsets and sizes of rows `[row, row + rows)` of the entry at `index` in a tensor of `shape`."""
    ones = (1,) * len(index)
    if len(shape) == len(index):
        return index, ones
    columns = shape[len(index) + 1 :]
    return (*index, row, *(0 for _ in columns)), (*ones, rows, *columns)


def fill_box(tensor: StoredTensor, source: Source, offsets: Shape, out: Bytes) -> None:
    """`read_box` into `out`, which tells the sizes: [*sizes, bytes of an element], in any strides."""
    got = 0
    ends = tuple(first + size for first, size in zip(offsets, out.shape[:-1], strict=True))
    for chunk in tensor.chunks:
        if not _meets(chunk, offsets, ends):
            continue
        low = tuple(map(max, offsets, chunk.offsets))
        high = (min(end, at + size) for end, at, size in zip(ends, chunk.offsets, chunk.sizes, strict=True))
        part = out[tuple(slice(a - first, b - first) for a, b, first in zip(low, high, offsets, strict=True))]
        strides = tuple(math.prod(chunk.sizes[dim:]) * out.shape[-1] for dim in range(1, len(low) + 1))
        skip = sum((a - at) * stride for a, at, stride in zip(low, chunk.offsets, strides, strict=True))
        read_strided(source, chunk.file, source.data_start(chunk) + skip, (*strides, 1), part)
        got += part.size
    if got != out.size:
        raise StorageError(f"`{tensor.name}`: {got} of {out.size} bytes of what was asked for are stored")


def _meets(chunk: Chunk, offsets: Shape, ends: Shape) -> bool:
    # A loop, not any(): tensors of many experts have thousands of chunks, and most part in the first dimension.
    for first, end, at, size in zip(offsets, ends, chunk.offsets, chunk.sizes, strict=True):
        if at >= end or first >= at + size:
            return False
    return True


def fresh(nbytes: int) -> Bytes:
    """Memory of undefined content."""
    return np.empty(nbytes, np.uint8)


def read_strided(
    source: Source,
    file: str,
    start: int,
    strides: Shape,
    out: Bytes,
    take: Callable[[int], Bytes] = fresh,
) -> None:
    """Fill `out`, of any strides, from bytes that lie `strides` apart in `file`, row-major from `start` on.

    What lies there as it does in `out` is read straight into it; else by strips, for which `take` gives memory.
    """
    if not out.size:
        return
    span, near = 1, True
    for count, stride in zip(reversed(out.shape), reversed(strides), strict=True):
        if count > 1:
            near = near and stride - span <= _NEAR_BYTES
            span += (count - 1) * stride
    if span == out.size and out.flags.c_contiguous:
        source.read_into(file, start, out.reshape(-1).data)
    elif near and span <= STRIP_BYTES:
        strip = take(span)
        source.read_into(file, start, strip.data)
        out[...] = np.ndarray(out.shape, np.uint8, strip, strides=strides)
    else:
        dim = next(dim for dim, count in enumerate(out.shape) if count > 1)
        half, every = out.shape[dim] // 2, (slice(None),) * dim
        near_half, far_half = every + (slice(half),), every + (slice(half, None),)
        read_strided(source, file, start, strides, out[near_half], take)
        read_strided(source, file, start + half * strides[dim], strides, out[far_half], take)
