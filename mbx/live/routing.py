"""Who sends what to whom: tensors in buckets, buckets in steps, and of every piece one of the ranks that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from converters.engine.boxes import Box
from converters.tensors import DTYPE_BITS, Shape

#: Where tensors begin in a bucket, and pieces in what travels.
ALIGNMENT = 256
#: What a gather of equal parts may carry in vain, as a part of what it has to.
_EVEN = 1.25


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the stream: safetensors name of its dtype, its shape; `group` names those that travel together."""

    name: str
    dtype: str
    shape: Shape
    group: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a box: `part` picks it from the box, whose shape it is of; None for all of it. `holders` have it."""

    box: Box
    part: tuple[slice, ...] | None
    shape: Shape
    dtype: str
    nbytes: int
    holders: tuple[int, ...]


@dataclass(slots=True)
class Step:
    """Pieces that travel at once.

    `regions` are what each pair of ranks exchanges, (sender, receiver) → pieces, the receiver -1 where all ranks get
    what the sender has.
    """

    pieces: list[Piece] = field(default_factory=list)
    regions: dict[tuple[int, int], list[Piece]] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that its sender has all of, and the pieces that make it there."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


#: (sender, receiver); the receiver is -1 where all ranks get what the sender has.
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Lot:
    """Tensors of one bucket: `whole` ones travel as they are and land where they stay, `steps` bring pieces of others.

    `receivers` are the ranks that get a tensor, by its name.
    """

    specs: tuple[TensorSpec, ...]
    receivers: Mapping[str, tuple[int, ...]]
    whole: Mapping[Pair, tuple[Whole, ...]]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A rank's buffer of one lot: the byte at which each tensor begins that it receives, and the bytes of all.

    `regions` are (first byte, bytes) of what arrives whole, by pair, and those of all pairs to all ranks equally long,
    with room behind, where that is `even`.
    """

    starts: Mapping[str, int]
    nbytes: int
    regions: Mapping[Pair, tuple[int, int]]
    even: bool


#: In place of a receiver: all ranks.
ALL = -1
#: Of a bucket: what its tensors may take, which equal parts of a gather may stretch by a quarter, and what may be on
#: the wire beside. Two buffers, of which somebody still holds the first, and the wire are two buckets.
_TENSORS, _WIRE = (7, 10), (1, 4)


def lots(
    specs: Sequence[TensorSpec],
    boxes: Mapping[str, Sequence[Box]],
    holders: Mapping[tuple[str, int], tuple[int, ...]],
    receivers: Callable[[str], tuple[int, ...]],
    world: int,
    bucket: int,
) -> Iterator[Lot]:
    """Buckets of at most `bucket` bytes, but for a group of tensors that is larger; the same on every rank."""
    limit = max(1, bucket * _WIRE[0] // _WIRE[1])
    for group in _bucketed(specs, bucket * _TENSORS[0] // _TENSORS[1]):
        asked = {spec.name: receivers(spec.name) for spec in group}
        whole: dict[Pair, list[Whole]] = {}
        cut: list[Piece] = []
        loads = [0] * world
        for spec in group:
            ranks, parts = asked[spec.name], boxes[spec.name]
            having = set.intersection(*(set(holders[box.source, box.chunk]) for box in parts))
            lacking = [rank for rank in ranks if rank not in having]
            if not having or not lacking or len(lacking) < len(ranks) < world:
                cut += _pieces(spec, parts, holders, limit)
                continue
            sender = min(having, key=lambda rank: (loads[rank], rank))
            loads[sender] += spec.nbytes
            one = Whole(spec, tuple(_pieces(spec, parts, holders, spec.nbytes)))
            for receiver in [ALL] if len(ranks) == world else ranks:
                whole.setdefault((sender, receiver), []).append(one)
        steps = tuple(_steps(cut, asked, world, limit))
        yield Lot(tuple(group), asked, {pair: tuple(own) for pair, own in whole.items()}, steps)


def arrange(lot: Lot, rank: int, world: int) -> Arrangement:
    """Where a rank has what of a lot."""
    sizes = [sum(_aligned(one.spec.nbytes) for one in lot.whole.get((sender, ALL), ())) for sender in range(world)]
    even = is_even(sizes)
    lengths = {(sender, ALL): max(sizes) if even else size for sender, size in enumerate(sizes) if any(sizes)}
    arriving = [pair for pair in lot.whole if pair[1] == rank]
    regions: dict[Pair, tuple[int, int]] = {}
    starts: dict[str, int] = {}
    end = 0
    for pair in (*lengths, *arriving):
        first = end
        own, end = starts_of([one.spec for one in lot.whole.get(pair, ())], first)
        starts |= own
        end = max(end, first + lengths.get(pair, 0))
        regions[pair] = first, end - first
    rest = [spec for spec in lot.specs if spec.name not in starts and rank in lot.receivers[spec.name]]
    own, end = starts_of(rest, end)
    return Arrangement({**starts, **own}, end, regions, even)


def starts_of(specs: Sequence[TensorSpec], first: int = 0) -> tuple[dict[str, int], int]:
    """The byte at which each tensor begins that lie behind one another, by name, and the byte behind the last."""
    at, starts = first, {}
    for spec in specs:
        starts[spec.name] = at
        at += _aligned(spec.nbytes)
    return starts, at


def _bucketed(specs: Sequence[TensorSpec], bucket: int) -> Iterator[list[TensorSpec]]:
    held: list[TensorSpec] = []
    size = 0
    for group in together(specs):
        nbytes = sum(_aligned(spec.nbytes) for spec in group)
        if held and size + nbytes > bucket:
            yield held
            held, size = [], 0
        held.extend(group)
        size += nbytes
    if held:
        yield held


def together(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """The tensors in their order, those of a group at the place of its first."""
    out: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        out.setdefault(spec.group or spec.name, []).append(spec)
    return list(out.values())


def _pieces(
    spec: TensorSpec, boxes: Sequence[Box], holders: Mapping[tuple[str, int], tuple[int, ...]], limit: int
) -> Iterator[Piece]:
    item = DTYPE_BITS[spec.dtype] // 8
    for box in boxes:
        shape, having = box.shape, holders[box.source, box.chunk]
        nbytes = prod(shape) * item
        if nbytes <= limit:
            yield Piece(box, None, shape, spec.dtype, nbytes, having)
            continue
        dim = max(range(len(shape)), key=lambda n: shape[n])
        step = max(1, shape[dim] * limit // nbytes)
        for first in range(0, shape[dim], step):
            count = min(step, shape[dim] - first)
            part = (*(slice(None),) * dim, slice(first, first + count))
            own = (*shape[:dim], count, *shape[dim + 1 :])
            yield Piece(box, part, own, spec.dtype, prod(own) * item, having)


def _steps(
    pieces: Iterable[Piece], receivers: Mapping[str, tuple[int, ...]], world: int, limit: int
) -> Iterator[Step]:
    step, loads = Step(), [0] * world
    for piece in pieces:
        asked = receivers[piece.box.tensor]
        lacking = [rank for rank in asked if rank not in piece.holders]
        moved = _aligned(piece.nbytes) * (1 if len(asked) == world else len(lacking)) if lacking else 0
        if step.nbytes and step.nbytes + moved > limit:
            yield step
            step, loads = Step(), [0] * world
        step.pieces.append(piece)
        step.nbytes += moved
        if not lacking:
            continue
        for receiver in [ALL] if len(asked) == world else lacking:
            sender = min(piece.holders, key=lambda rank: (loads[rank], rank))
            loads[sender] += piece.nbytes
            step.regions.setdefault((sender, receiver), []).append(piece)
    if step.pieces:
        yield step


def extent(pieces: Sequence[Piece]) -> int:
    """Bytes of pieces that lie behind one another."""
    return sum(_aligned(piece.nbytes) for piece in pieces)


def places(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int]]:
    """Each piece with the byte at which it begins."""
    at = 0
    for piece in pieces:
        yield piece, at
        at += _aligned(piece.nbytes)


def is_even(sizes: Sequence[int]) -> bool:
    """Whether parts of these sizes are gathered at once, as equal ones: else each is broadcast for itself."""
    return len(sizes) * max(sizes, default=0) <= _EVEN * sum(sizes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
