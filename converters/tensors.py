"""Named global tensors and the chunks a format stores them in."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]

#: Storage dtypes by their safetensors name, with the bits of one element.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


def nbytes_of(dtype: str, shape: Shape) -> int:
    """Bytes of a dense row-major tensor of `shape`."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored box of a global tensor.

    `offsets` and `sizes` are in elements of the global tensor. The data lie row-major in `file`
    (relative to the checkpoint's folder). `start` is the byte offset of the raw data, or, when
    `archive_bytes` is not 0, of a torch.save archive of that many bytes that holds them. The archive's own tensor
    lacks the first `unstacked` dimensions, each of which is 1 here: a stack whose entries are stored apart.
    """

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    archive_bytes: int = 0
    unstacked: int = 0

    @property
    def stored_sizes(self) -> Shape:
        """Sizes of the stored tensor."""
        return self.sizes[self.unstacked :]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor: its name, safetensors dtype name, global shape and the chunks that tile it."""

    name: str
    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]

    @classmethod
    def whole(cls, name: str, dtype: str, shape: Shape, file: str, start: int) -> StoredTensor:
        """A tensor in one chunk, from byte `start` of a file on."""
        return cls(name, dtype, shape, (Chunk((0,) * len(shape), shape, file, start),))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return nbytes_of(self.dtype, self.shape)
