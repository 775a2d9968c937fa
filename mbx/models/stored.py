"""Reads rows and boxes of stored tensors into torch, for models that hold few weights at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.engine.regions import TensorGrid, matrix
from converters.errors import StorageError, UnsupportedError
from converters.tensors import DTYPE_BITS, Shape, StoredTensor
from mbx.formats.files import FileSource

if TYPE_CHECKING:
    import torch


def read_rows(
    tensor: StoredTensor, source: FileSource, runs: Sequence[tuple[int, int]], index: Shape = ()
) -> torch.Tensor:
    """Rows of one entry of `tensor`: [rows of all runs, *rest], in the stored dtype.

    `runs` are (first row, number of rows); `index` picks the entry along the leading dimensions. Raises StorageError
    where a row is not stored, UnsupportedError for a dtype that torch has not.
    """
    import torch

    from converters.torch_casts import TORCH_DTYPES

    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedError(f"torch has no dtype for `{tensor.name}`, which is {tensor.dtype}")
    _, cols = matrix(tensor.shape, len(index))
    item = DTYPE_BITS[tensor.dtype] // 8
    out = np.empty((sum(count for _, count in runs), cols * item), np.uint8)
    extents = TensorGrid(tensor, len(index)).extents(index)
    at = filled = 0
    for first, count in runs:
        for extent, row, rows in extents.overlap(first, count):
            start = source.data_start(extent.chunk) + extent.start + (row - extent.row) * extent.pitch
            part = out[at + row - first : at + row - first + rows]
            _read(source, extent.chunk.file, start, part, extent.col * item, extent.pitch)
            filled += rows * extent.pitch
        at += count
    if filled != out.size:
        raise StorageError(f"`{tensor.name}`: {filled} of {out.size} bytes of the rows asked for are stored")
    shape = (len(out), *tensor.shape[len(index) + 1 :]) if len(tensor.shape) > len(index) else ()
    return torch.from_numpy(out.reshape(-1)).view(dtype).reshape(shape)


def _read(
    source: FileSource, file: str, start: int, out: npt.NDArray[np.uint8], first_byte: int, row_bytes: int
) -> None:
    """Bytes `[first_byte, first_byte + row_bytes)` of every row of `out`, which lie one behind the other in `file`."""
    if row_bytes == out.shape[1]:
        source.read_into(file, start, out.reshape(-1).data)
        return
    strip = np.empty((len(out), row_bytes), np.uint8)
    source.read_into(file, start, strip.reshape(-1).data)
    out[:, first_byte : first_byte + row_bytes] = strip


def read_whole(tensor: StoredTensor, source: FileSource) -> torch.Tensor:
    """All of `tensor`, in the stored dtype."""
    return read_rows(tensor, source, [(0, matrix(tensor.shape, 0)[0])])


def read_box(tensor: StoredTensor, source: FileSource, index: Shape, offsets: Shape, sizes: Shape) -> torch.Tensor:
    """The box of `sizes` from `offsets` on within the entry at `index`: `sizes`, in the stored dtype.

    All columns of its rows are read, then cut.
    """
    if not sizes:
        return read_rows(tensor, source, [(0, 1)], index)
    rows = read_rows(tensor, source, [(offsets[0], sizes[0])], index)
    for dim, (offset, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), 1):
        rows = rows.narrow(dim, offset, size)
    return rows


def row_runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending row numbers as runs of (first, count)."""
    numbers = np.asarray(rows, np.int64)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(part[0]), len(part)) for part in parts if len(part)]
