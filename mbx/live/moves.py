"""Copies between a rank's memory and its buffers, as strides: worked out once, made at every export.

A piece of a box is a few numbers on either side. Boxes that follow one another evenly on both, as a stack of experts
does, are one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from converters.engine.boxes import Box
from converters.errors import UsageError
from converters.tensors import DTYPE_BITS, Shape
from converters.torch_casts import TORCH_DTYPES
from mbx.live.routing import Piece, TensorSpec
from mbx.live.shards import Shard, Views


@dataclass(frozen=True, slots=True)
class Move:
    """Elements of `shape` from the memory of `shard`, or a wire where that is None, into a buffer; `dtype` is theirs.

    `source` and `target` are the first element and the strides of either side: in elements from where the shard's
    parameter begins, and in elements of `dtype` from where a buffer begins. `shift` is added on the way.
    """

    shard: Shard | None
    dtype: str
    shape: Shape
    source: tuple[int, Shape]
    target: tuple[int, Shape]
    shift: int = 0


def to_buffer(piece: Piece, spec: TensorSpec, at: int, shard: Shard) -> Move:
    """A piece from the shard that has it to its tensor, which begins at byte `at` of a buffer."""
    return Move(shard, spec.dtype, piece.shape, _held(piece, shard), _placed(piece, spec, at), piece.box.shift)


def to_wire(piece: Piece, at: int, shard: Shard) -> Move:
    """A piece from the shard that has it to the byte `at` of a wire."""
    return Move(shard, piece.dtype, piece.shape, _held(piece, shard), _on_wire(piece, at), piece.box.shift)


def from_wire(piece: Piece, at: int, spec: TensorSpec, start: int) -> Move:
    """A piece from the byte `at` of a wire to its tensor, which begins at byte `start` of a buffer."""
    return Move(None, spec.dtype, piece.shape, _on_wire(piece, at), _placed(piece, spec, start))


def joined(moves: Iterable[Move]) -> tuple[Move, ...]:
    """The same copies, those that follow one another evenly on both sides made one."""
    return tuple(_joined(moves))


def _joined(moves: Iterable[Move]) -> Iterator[Move]:
    run: list[Move] = []
    for move in moves:
        if run and not _follows(run, move):
            yield _one(run)
            run = []
        run.append(move)
    if run:
        yield _one(run)


def _follows(run: Sequence[Move], move: Move) -> bool:
    last = run[-1]
    if move.shard is not last.shard or (move.shape, move.dtype, move.shift) != (last.shape, last.dtype, last.shift):
        return False
    if (move.source[1], move.target[1]) != (last.source[1], last.target[1]):
        return False
    apart = _apart(last, move)
    return min(apart) > 0 if len(run) == 1 else apart == _apart(run[0], run[1])


def _apart(a: Move, b: Move) -> tuple[int, int]:
    return b.source[0] - a.source[0], b.target[0] - a.target[0]


def _one(run: Sequence[Move]) -> Move:
    first = run[0]
    if len(run) == 1:
        return first
    source, target = _apart(first, run[1])
    return replace(
        first,
        shape=(len(run), *first.shape),
        source=(first.source[0], (source, *first.source[1])),
        target=(first.target[0], (target, *first.target[1])),
    )


def _placed(piece: Piece, spec: TensorSpec, at: int) -> tuple[int, Shape]:
    """A piece in its tensor."""
    first, strides = at * 8 // DTYPE_BITS[spec.dtype], contiguous(spec.shape)
    first += sum(part.start * stride for part, stride in zip(piece.box.index, strides, strict=True))
    own = tuple(part.step * stride for part, stride in zip(piece.box.index, strides, strict=True))
    return first + _part(piece, own), own


def _on_wire(piece: Piece, at: int) -> tuple[int, Shape]:
    return at * 8 // DTYPE_BITS[piece.dtype], contiguous(piece.shape)


def _held(piece: Piece, shard: Shard) -> tuple[int, Shape]:
    """A piece in the memory of the parameter that its shard lies in."""
    box: Box = piece.box
    strides = (*(0,) * shard.stacked, *shard.strides)
    sizes, kept, first = [], [], shard.first
    for part, stride, size in zip(box.held, strides, shard.sizes, strict=False):
        if isinstance(part, int):
            first += part * stride
        else:
            begin, end, step = part.indices(size)
            first += begin * stride
            sizes.append(len(range(begin, end, step)))
            kept.append(step * stride)
    behind = len(box.held)
    sizes += shard.sizes[behind:]
    kept += strides[behind:]
    if box.transposed:
        sizes, kept = sizes[::-1], kept[::-1]
    own = _reshaped(sizes, kept, box.shape)
    return first + _part(piece, own), own


def _part(piece: Piece, strides: Shape) -> int:
    """How far from its box's first element a piece begins."""
    parts = piece.part or ()
    return sum((part.start or 0) * stride for part, stride in zip(parts, strides, strict=False))


def _reshaped(sizes: Sequence[int], strides: Sequence[int], shape: Shape) -> Shape:
    """The strides of elements seen in another shape."""
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    if [size for size, _ in kept] == [size for size in shape if size != 1]:
        rest = iter(stride for _, stride in kept)
        return tuple(0 if size == 1 else next(rest) for size in shape)
    return tuple(torch.empty_strided(sizes, strides, device="meta").view(shape).stride())


def contiguous(shape: Shape) -> Shape:
    """The strides of a tensor whose elements lie behind one another."""
    out, step = [], 1
    for size in reversed(shape):
        out.append(step)
        step *= size
    return tuple(reversed(out))


class Copies:
    """Values and where they go, written at once: thousands of small copies in few kernels."""

    def __init__(self) -> None:
        self._dense: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def add(self, target: torch.Tensor, values: torch.Tensor, shift: int = 0, *, now: bool = False) -> None:
        """Write `values` into `target`, when this runs or `now`; see `assign`."""
        same = not shift and target.dtype == values.dtype and target.device == values.device
        if same and not now and target.is_contiguous() and values.is_contiguous():
            targets, sources = self._dense.setdefault(target.dtype, ([], []))
            targets.append(target)
            sources.append(values)
        else:
            assign(target, values, shift)

    def run(self) -> None:
        """Write what is left."""
        for targets, sources in self._dense.values():
            torch._foreach_copy_(targets, sources)
        self._dense.clear()


def make(moves: Sequence[Move], views: Views | None, buffer: torch.Tensor, wire: torch.Tensor | None = None) -> None:
    """Carry out moves: from shards, whose memory `views` has, or from a `wire`, into a `buffer` (both uint8)."""
    copies, owners = Copies(), dict[int, torch.Tensor]()
    typed, arriving = Typed(buffer), None if wire is None else Typed(wire)
    for move in moves:
        if move.shard is None:
            assert arriving is not None
            owner, computed = arriving[move.dtype], False
        else:
            assert views is not None
            found, computed = owners.get(id(move.shard)), False
            if found is None:
                found, computed = views.taken(move.shard)
                if not computed:  # what is computed is of no use behind this copy, and takes memory
                    owners[id(move.shard)] = found
            owner = found
        first, strides = move.source
        values = owner.as_strided(move.shape, strides, owner.storage_offset() + first)
        into = typed[move.dtype]
        target = into.as_strided(move.shape, move.target[1], into.storage_offset() + move.target[0])
        copies.add(target, values, move.shift, now=computed)
    copies.run()


class Typed:
    """A buffer as elements of any dtype."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer, self._seen = buffer, dict[str, torch.Tensor]()

    def __getitem__(self, dtype: str) -> torch.Tensor:
        if dtype not in self._seen:
            self._seen[dtype] = self._buffer.view(TORCH_DTYPES[dtype])
        return self._seen[dtype]


def assign(target: torch.Tensor, values: torch.Tensor, shift: int = 0) -> None:
    """Write values into memory of another dtype, shifted in fp32 and rounded once.

    UsageError where fp16 has no room for one.
    """
    target.copy_(values.float() + shift if shift else values)
    if target.dtype == torch.float16 and values.dtype != torch.float16 and not torch.isfinite(target).all():
        lost = int((torch.isinf(target) & torch.isfinite(values).to(target.device)).sum())
        if lost:
            raise UsageError(
                f"{lost} value(s) are beyond fp16's range, 65504, and would be infinite",
                hint="‹dtype› bf16 keeps the range, ‹dtype› fp32 every value",
            )
