"""Reads rows and boxes of stored tensors into torch, for models that hold few weights at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from converters import stored
from converters.engine.regions import matrix
from converters.protocols import Source
from converters.tensors import Shape, StoredTensor

if TYPE_CHECKING:
    import torch


def read_rows(
    tensor: StoredTensor, source: Source, runs: Sequence[tuple[int, int]], index: Shape = ()
) -> torch.Tensor:
    """Rows of one entry of `tensor`: [rows of all runs, *rest], in the stored dtype.

    `runs` are (first row, number of rows); `index` picks the entry along the leading dimensions. Raises StorageError
    where a row is not stored, UnsupportedError for a dtype that torch has not.
    """
    inner = tensor.shape[len(index) + 1 :]
    parts = [stored.read_rows(tensor, source, index, first, count) for first, count in runs]
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    from converters.torch_casts import in_torch

    shape = (len(data), *inner) if len(tensor.shape) > len(index) else ()
    return in_torch(data, tensor.name, tensor.dtype, shape)


def read_whole(tensor: StoredTensor, source: Source) -> torch.Tensor:
    """All of `tensor`, in the stored dtype."""
    return read_rows(tensor, source, [(0, matrix(tensor.shape, 0)[0])])


def read_box(tensor: StoredTensor, source: Source, index: Shape, offsets: Shape, sizes: Shape) -> torch.Tensor:
    """The box of `sizes` from `offsets` on within the entry at `index`: `sizes`, in the stored dtype."""
    data = stored.read_box(tensor, source, (*index, *offsets), (*(1 for _ in index), *sizes))
    from converters.torch_casts import in_torch

    return in_torch(data, tensor.name, tensor.dtype, sizes)


def row_runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending row numbers as runs of (first, count)."""
    numbers = np.asarray(rows, np.int64)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(part[0]), len(part)) for part in parts if len(part)]
