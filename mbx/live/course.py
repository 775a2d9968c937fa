"""One rank's part in a lot, worked out: what it copies where, sends, receives, puts together. It holds no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mbx.live.exchange import World
from mbx.live.moves import Move, from_wire, joined, to_buffer, to_wire
from mbx.live.routing import ALL, Lot, Piece, Step, TensorSpec, arrange, extent, is_even, places, starts_of


@dataclass(frozen=True, slots=True)
class Parcel:
    """What travels between this rank and `peer`: a wire of `nbytes`, and the copies into it or out of it."""

    peer: int
    nbytes: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """What all ranks get of each: (first byte, bytes) by rank in one buffer, all as long where they are `even`."""

    regions: tuple[tuple[int, int], ...]
    even: bool


@dataclass(frozen=True, slots=True)
class Leg:
    """One step of pieces: what `gather` brings of all, packed by `pack` and unpacked by `unpack`, and parcels."""

    gather: Gather | None
    nbytes: int
    pack: tuple[Move, ...]
    unpack: tuple[Move, ...]
    sent: tuple[Parcel, ...]
    received: tuple[Parcel, ...]


@dataclass(frozen=True, slots=True)
class Course:
    """A lot for one rank: its tensors, each with the byte at which it begins in this rank's buffer, None for others'.

    `fills` are copies from its own memory. `gather` are whole tensors for all, in the buffer itself; `sent` those for
    one, `landing` where such begin in the buffer: (sender, first byte, bytes). `legs` bring pieces of others.
    """

    tensors: tuple[tuple[TensorSpec, int | None], ...]
    nbytes: int
    fills: tuple[Move, ...]
    gather: Gather | None
    sent: tuple[Parcel, ...]
    landing: tuple[tuple[int, int, int], ...]
    legs: tuple[Leg, ...]


def course_of(lot: Lot, world: World) -> Course:
    """What this rank does of a lot."""
    placed, planner = arrange(lot, world.rank, world.size), _Planner(lot, world)
    fills, sent, landing = [], [], []
    for (sender, receiver), own in lot.whole.items():
        if sender == world.rank and receiver == ALL:
            for one in own:
                fills += [planner.filled(piece, placed.starts[one.spec.name]) for piece in one.pieces]
        elif sender == world.rank:
            starts, nbytes = starts_of([one.spec for one in own])
            moves = (planner.filled(piece, starts[one.spec.name]) for one in own for piece in one.pieces)
            sent.append(Parcel(receiver, nbytes, joined(moves)))
        elif receiver == world.rank:
            landing.append((sender, *placed.regions[sender, receiver]))
    for step in lot.steps:
        for piece in step.pieces:
            if world.rank in piece.holders and piece.box.tensor in placed.starts:
                fills.append(planner.filled(piece, placed.starts[piece.box.tensor]))
    gather = None
    if any(receiver == ALL for _, receiver in lot.whole):
        gather = Gather(tuple(placed.regions[sender, ALL] for sender in range(world.size)), placed.even)
    legs = tuple(planner.leg(step, placed.starts) for step in lot.steps if step.regions)
    tensors = tuple((spec, placed.starts.get(spec.name)) for spec in lot.specs)
    return Course(tensors, placed.nbytes, joined(fills), gather, tuple(sent), tuple(landing), legs)


class _Planner:
    """Copies of a lot's pieces."""

    def __init__(self, lot: Lot, world: World) -> None:
        self._specs, self._world = {spec.name: spec for spec in lot.specs}, world

    def filled(self, piece: Piece, at: int) -> Move:
        """From this rank's memory to the tensor that begins at `at`."""
        shard = self._world.mine[piece.box.source, piece.box.chunk][0]
        return to_buffer(piece, self._specs[piece.box.tensor], at, shard)

    def leg(self, step: Step, starts: Mapping[str, int]) -> Leg:
        """This rank's part in a step."""
        me, size = self._world.rank, self._world.size
        shared = [step.regions.get((sender, ALL), []) for sender in range(size)]
        sizes = [extent(pieces) for pieces in shared]
        even, largest = is_even(sizes), max(sizes)
        firsts = [largest * rank if even else sum(sizes[:rank]) for rank in range(size)]
        lengths = [largest] * size if even else sizes
        unpack: list[Move] = []
        for sender, pieces in enumerate(shared):
            if sender != me:
                unpack += self._unpacked(pieces, firsts[sender], starts)
        sent, received = [], []
        for (sender, receiver), pieces in step.regions.items():
            if sender == me and receiver != ALL:
                sent.append(Parcel(receiver, extent(pieces), self._packed(pieces, 0)))
            elif receiver == me:
                received.append(Parcel(sender, extent(pieces), joined(self._unpacked(pieces, 0, starts))))
        return Leg(
            Gather(tuple(zip(firsts, lengths, strict=True)), even) if any(sizes) else None,
            sum(lengths),
            self._packed(shared[me], firsts[me]),
            joined(unpack),
            tuple(sent),
            tuple(received),
        )

    def _packed(self, pieces: Sequence[Piece], first: int) -> tuple[Move, ...]:
        mine = self._world.mine
        return joined(
            to_wire(piece, first + at, mine[piece.box.source, piece.box.chunk][0]) for piece, at in places(pieces)
        )

    def _unpacked(self, pieces: Sequence[Piece], first: int, starts: Mapping[str, int]) -> list[Move]:
        return [
            from_wire(piece, first + at, self._specs[piece.box.tensor], starts[piece.box.tensor])
            for piece, at in places(pieces)
            if piece.box.tensor in starts and self._world.rank not in piece.holders
        ]
