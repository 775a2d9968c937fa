"""Merging: `W + scale · B A` on the rows of a piece, in fp32, rounded once to what the target stores.

DoRA: `m / |W + scale · B A| · (W + scale · B A)`, norms by rows (arXiv 2402.09353). The order of operations is that of
PEFT's `merge_and_unload` on an fp32 model, so the values are its own, bit by bit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from converters.engine.regions import matrix
from converters.protocols import Source
from converters.rows.pack import Pack, Slot, slot_rows
from converters.stored import read_rows
from converters.tensors import Shape, StoredTensor

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]
#: Rows of B that are multiplied at once start at multiples of this. A product of fewer rows may take another path
#: through the BLAS and round differently (measured: 7 rows of 4096 did, blocks of 64 and more did not).
_BLOCK = 64
#: Factors kept in memory, at least the two in use.
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Site:
    """One A, one B and, for DoRA, one m: names of their tensors, and the part of each that belongs here.

    `atoms` are the atoms of the weight that B's rows hold, in the order of `pack`. `index` picks an entry of leading
    dimensions `stack`. With `experts`, A's rows and B's columns hold all experts, this one being number `expert`:
    A `[experts · r, in]`, B `[out, r · experts]` with the expert fastest (`ParamWrapper` of PEFT). With `a_rows`,
    A holds several factors in that many rows, this one from row `first` on.
    """

    a: str
    b: str
    m: str | None
    atoms: tuple[int, ...]
    pack: Pack
    rank: int
    inputs: int
    index: Shape = ()
    stack: Shape = ()
    expert: int = 0
    experts: int = 0
    first: int = 0
    a_rows: int = 0

    @property
    def a_shape(self) -> Shape:
        """Shape of the whole tensor A."""
        return (*self.stack, self.a_rows or self.rank * max(1, self.experts), self.inputs)

    @property
    def b_shape(self) -> Shape:
        """Shape of the whole tensor B."""
        return (*self.stack, self.pack.rows, self.rank * max(1, self.experts))

    @property
    def m_shape(self) -> Shape:
        """Shape of the whole tensor m."""
        return (*self.stack, self.pack.rows)

    @property
    def a_slot(self) -> Slot:
        """Rows of A that are this site's."""
        return Slot(self.expert * self.rank if self.experts else self.first, self.rank, self.rank, 1)

    @property
    def a_key(self) -> tuple[str, Shape, int]:
        """What two sites share that have one factor A."""
        return self.a, self.index, self.a_slot.start

    @property
    def owns_a(self) -> bool:
        """Whether the tensor A holds this factor alone."""
        return not self.stack and not self.experts and self.a_rows in (0, self.rank)

    def rows(self) -> dict[int, Slot]:
        """Rows of B and m by atom."""
        return dict(zip(self.atoms, self.pack.slots(), strict=True))


class Matrices(Protocol):
    """Gives an adapter's matrices."""

    def matrix(self, name: str, index: tuple[int, ...]) -> torch.Tensor:
        """The entry `index` of a tensor, fp32 [rows, cols]."""
        ...


class Factors:
    """Reads an adapter's matrices as fp32, and keeps the last ones: the rows of one weight ask for the same."""

    def __init__(self, source: Source, tensors: Mapping[str, StoredTensor]) -> None:
        self._source, self._tensors = source, tensors
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def matrix(self, name: str, index: tuple[int, ...]) -> torch.Tensor:
        """The entry `index` of a tensor, fp32 [rows, cols]."""
        key = name, index
        with self._lock:
            if (held := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return held
        value = _read(self._source, self._tensors[name], index)
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > 4 and sum(t.nbytes for t in self._kept.values()) > _CACHE_BYTES:
                self._kept.popitem(last=False)
        return value


def _read(source: Source, tensor: StoredTensor, index: tuple[int, ...]) -> torch.Tensor:
    import torch

    from converters.torch_casts import TORCH_DTYPES

    rows, cols = matrix(tensor.shape, len(index))
    data = read_rows(tensor, source, index, 0, rows)
    return torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[tensor.dtype]).reshape(rows, cols).float()


@dataclass(frozen=True, slots=True)
class Part:
    """One atom of a weight: its rows in the target's matrix, and the adapter that updates it."""

    atom: int
    slot: Slot
    site: Site
    scale: float


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Rows of a weight, by number, that the rows of `tensor` replace in this order."""

    tensor: str
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one entry of a target tensor; `transposed` says that the target stores columns first.

    `replaced` are rows that become others, whatever `parts` add to them.
    """

    parts: tuple[Part, ...]
    transposed: bool = False
    replaced: tuple[RowsOf, ...] = ()

    def scratch_bytes(self, rows: int, cols: int) -> int:
        """Memory that `apply` takes for `rows` rows of `cols` columns: the weight, the products and their sum."""
        return 12 * (rows + 2 * _BLOCK) * cols

    def identity(self) -> str:
        """Everything that decides what `apply` adds, as text."""
        return repr((self.parts, self.transposed, self.replaced) if self.replaced else (self.parts, self.transposed))

    def apply(self, factors: Factors, data: Bytes, row: int, source: str, target: str) -> Bytes:
        """Rows of a target's matrix from `row` on, updated and cast from dtype `source` to `target`.

        data: [rows, bytes of a row], of dtype `source`; the result has its rows.
        """
        import torch

        from converters.torch_casts import TORCH_DTYPES

        stored = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(TORCH_DTYPES[source])
        weight = stored.reshape(len(data), -1).to(torch.float32, copy=True)
        self.add(factors, weight, row)
        out: Bytes = weight.to(TORCH_DTYPES[target]).reshape(-1).view(torch.uint8).numpy()
        return out.reshape(len(data), -1)

    def add(self, factors: Matrices, weight: torch.Tensor, row: int = 0) -> None:
        """Update rows of a matrix from `row` on, fp32 [rows, cols], in place, on the device of the factors."""
        for part in self.parts:
            if self.transposed:
                self._columns(factors, part, weight, row)
            else:
                _rows(factors, part, weight, row)
        for new in self.replaced:
            here = [(at, number - row) for at, number in enumerate(new.rows) if row <= number < row + len(weight)]
            for at, number in here:
                weight[number] = factors.matrix(new.tensor, ())[at]

    def _columns(self, factors: Matrices, part: Part, weight: torch.Tensor, row: int) -> None:
        """The update where the weight lies turned round: its rows are A's columns. Rows behind them are padding."""
        import torch

        a, b = factors_of(factors, part.site)
        weight = weight[: max(0, a.shape[1] - row)]
        if not len(weight):
            return
        first, last = _blocks(row, row + len(weight), a.shape[1])
        mine_b = b[torch.from_numpy(slot_rows(part.site.rows()[part.atom]))]
        product = (mine_b @ a[:, first:last]) * part.scale
        mine = product[:, row - first : row - first + len(weight)].t()
        weight[:, torch.from_numpy(slot_rows(part.slot))] += mine


def _rows(factors: Matrices, part: Part, weight: torch.Tensor, row: int) -> None:
    import torch

    rows = slot_rows(part.slot)
    lo, hi = (int(n) for n in np.searchsorted(rows, (row, row + len(weight))))
    if lo == hi:
        return
    a, b = factors_of(factors, part.site)
    of_b = slot_rows(part.site.rows()[part.atom])[lo:hi]
    first, last = _blocks(int(of_b[0]), int(of_b[-1]) + 1, len(b))
    delta = ((b[first:last] @ a) * part.scale)[torch.from_numpy(of_b - first)]
    at = torch.from_numpy(rows[lo:hi] - row)
    total = weight[at] + delta
    if part.site.m is not None:
        m = factors.matrix(part.site.m, part.site.index)[torch.from_numpy(of_b), 0]
        factor = m / torch.linalg.norm(total, dim=1)
        total = factor[:, None] * total
    weight[at] = total


def factors_of(factors: Matrices, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a site, fp32."""
    slot = site.a_slot
    a = factors.matrix(site.a, site.index)[slot.start : slot.start + site.rank]
    b = factors.matrix(site.b, site.index)
    if site.experts:
        b = b.reshape(len(b), site.rank, site.experts)[:, :, site.expert].contiguous()
    return a, b


def _blocks(first: int, last: int, count: int) -> tuple[int, int]:
    """The least run of whole blocks of `count` rows that covers `[first, last)`; the last block takes the rest."""
    blocks = max(1, count // _BLOCK)
    begin, end = min(first // _BLOCK, blocks - 1), min((last - 1) // _BLOCK, blocks - 1) + 1
    return begin * _BLOCK, count if end == blocks else end * _BLOCK
