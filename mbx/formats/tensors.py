"""Named tensors, read by region into NumPy or torch: what a checkpoint, and a view of one, answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from converters.errors import CoverageError, UsageError
from converters.tensors import Shape, nbytes_of

if TYPE_CHECKING:
    import torch

Index = int | slice
#: What NumPy's basic indexing takes, steps of 1: `3`, `slice(0, 8)`, `(slice(0, 8), 2)`. None is all.
Region = Index | tuple[Index, ...] | None
#: NumPy's dtypes by safetensors name. Those that NumPy lacks are given as bits of their width.
_NUMPY: dict[str, str] = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "I16": "i2",
    "U16": "u2",
    "F16": "f2",
    "BF16": "u2",
    "I32": "i4",
    "U32": "u4",
    "F32": "f4",
    "I64": "i8",
    "U64": "u8",
    "F64": "f8",
    "C64": "c8",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor's header: its name, dtype by safetensors' name (`BF16`, `F32`, …) and global shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return nbytes_of(self.dtype, self.shape)


class NamedTensors(ABC):
    """Tensors by name; none of them is in memory until it is read."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the checkpoint."""

    @abstractmethod
    def _spec(self, name: str) -> Spec | None:
        """The header of a tensor, None where there is none of that name."""

    @abstractmethod
    def _read(self, name: str, offsets: Shape, sizes: Shape) -> npt.NDArray[np.uint8]:
        """A box of a tensor: [*sizes, bytes of an element]."""

    def spec(self, name: str) -> Spec:
        """The header of a tensor; CoverageError, with near misses, where there is none of that name."""
        found = self._spec(name)
        if found is None:
            from difflib import get_close_matches

            close = get_close_matches(name, self.names(), n=3)
            raise CoverageError(
                f"there is no tensor `{name}`", hint=f"near: {', '.join(close)}" if close else None, details=close
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._spec(name) is not None

    @overload
    def read(self, name: str, region: Region = None, *, to: Literal["numpy"] = "numpy") -> npt.NDArray[Any]: ...

    @overload
    def read(self, name: str, region: Region = None, *, to: Literal["torch"]) -> torch.Tensor: ...

    def read(
        self, name: str, region: Region = None, *, to: Literal["numpy", "torch"] = "numpy"
    ) -> npt.NDArray[Any] | torch.Tensor:
        """A tensor, or a region of it by NumPy's basic indexing (steps of 1): values as they are stored.

        Nothing outside the region is kept, and little is read; several threads may read at once. dtypes that NumPy
        lacks come as their bits: BF16 as uint16, FP8 as uint8; `to="torch"` gives torch's own. Raises CoverageError
        for another name, UsageError for a region outside the tensor, StorageError where it cannot be read.
        """
        spec = self.spec(name)
        offsets, sizes, shape = box_of(region, spec.shape)
        raw = self._read(name, offsets, sizes)
        if to == "torch":
            from converters.torch_casts import in_torch

            return in_torch(raw, name, spec.dtype, shape)
        return raw.reshape(-1).view(f"<{_NUMPY[spec.dtype]}").reshape(shape)


def box_of(region: Region, shape: Shape) -> tuple[Shape, Shape, Shape]:
    """Offsets and sizes of a region of a tensor of `shape`, and the shape that it has once read.

    UsageError for a region that is not within the tensor, or not a box.
    """
    given = () if region is None else region if isinstance(region, tuple) else (region,)
    if len(given) > len(shape):
        raise UsageError(f"a region of {len(given)} dimensions of a tensor of shape {list(shape)}")
    offsets, sizes, kept = [], [], []
    for size, index in zip(shape, (*given, *(slice(None) for _ in shape[len(given) :])), strict=True):
        if isinstance(index, slice):
            start, stop, step = index.indices(size)
            if step != 1:
                raise UsageError(f"a region has steps of 1, got {step}")
            offsets.append(start)
            sizes.append(max(0, stop - start))
            kept.append(sizes[-1])
        else:
            at = index + size if index < 0 else index
            if not 0 <= at < size:
                raise UsageError(f"index {index} is outside a dimension of {size}")
            offsets.append(at)
            sizes.append(1)
    return tuple(offsets), tuple(sizes), tuple(kept)
