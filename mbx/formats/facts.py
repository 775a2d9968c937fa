"""What `mbx inspect` says of a checkpoint: its format, writer, model, tensors, files and faults."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.tensors import StoredTensor
from mbx.formats.adapter_facts import Facts


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's header, how many chunks it has along each dimension, and the files they lie in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    grid: tuple[int, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `examine` found. `fault` says what is missing or damaged; None means whole.

    `tensors` are the model's weights; `other_state` counts the rest by kind, as (tensors, bytes). `files` holds the
    data files with their sizes, `layout` the parallel sizes as far as they show. `adapter` is set where the tensors
    are those of an adapter.
    """

    path: Path
    format: str
    writer: str | None = None
    fault: str | None = None
    iteration: int | None = None
    architecture: str | None = None
    table: str | None = None
    layout: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    other_state: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    num_objects: int = 0
    files: Mapping[str, int] = field(default_factory=dict)
    side_files: tuple[str, ...] = ()
    adapter: Facts | None = None

    @property
    def num_tensors(self) -> int:
        """Tensors of the model."""
        return len(self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of the model's tensors, padding and buffers included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_chunks(self) -> int:
        """Stored chunks of the model's tensors."""
        return sum(math.prod(tensor.grid) for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, tuple[int, int]]:
        """(tensors, bytes) by dtype."""
        return count_by((tensor.dtype, tensor.nbytes) for tensor in self.tensors)


def described(tensors: Mapping[str, StoredTensor]) -> tuple[Tensor, ...]:
    """Headers as they are shown."""
    return tuple(
        Tensor(
            t.name,
            t.dtype,
            t.shape,
            t.nbytes,
            tuple(len({chunk.offsets[dim] for chunk in t.chunks}) for dim in range(len(t.shape))),
            tuple(sorted({chunk.file for chunk in t.chunks})),
        )
        for t in tensors.values()
    )


def count_by(items: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """(count, bytes) by name, of pairs of name and bytes."""
    counts: dict[str, tuple[int, int]] = {}
    for name, nbytes in items:
        count, total = counts.get(name, (0, 0))
        counts[name] = (count + 1, total + nbytes)
    return dict(sorted(counts.items()))
