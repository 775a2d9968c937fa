"""A lot of an export on the wire: whole tensors land where they stay, pieces of others are packed and put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from converters.engine.boxes import Box
from converters.errors import UsageError
from converters.torch_casts import TORCH_DTYPES
from mbx.live.routing import (
    ALL,
    Arrangement,
    Lot,
    Piece,
    Step,
    TensorSpec,
    Whole,
    arrange,
    extent,
    is_even,
    places,
    starts_of,
)

#: The live memory of a box, in the box's shape.
ViewOf = Callable[[Box], torch.Tensor]


class Transport:
    """Carries lots between the ranks of the default process group; `device` is where its buffers lie."""

    def __init__(self, rank: int, world: int, device: torch.device, live_of: ViewOf) -> None:
        self.rank, self.world, self.device, self.live_of = rank, world, device, live_of
        self.in_place = device.type != "cpu"

    def carry(self, lot: Lot) -> tuple[Arrangement, torch.Tensor | None]:
        """Bring a lot to its receivers; this rank's buffer of it, None where it receives nothing. Collective."""
        placed = arrange(lot, self.rank, self.world)
        data = self._buffer(placed.nbytes) if placed.nbytes else None
        if data is not None and any(receiver == ALL for _, receiver in lot.whole):
            self._whole_to_all(lot, placed, data)
        if any(receiver != ALL for _, receiver in lot.whole):
            self._whole_to_some(lot, placed, data)
        if lot.steps:
            cut = {piece.box.tensor for step in lot.steps for piece in step.pieces}
            specs = [spec for spec in lot.specs if spec.name in cut and spec.name in placed.starts]
            outs = {} if data is None else {spec.name: view_of(data, spec, placed.starts[spec.name]) for spec in specs}
            for step in lot.steps:
                self._step(step, outs)
        return placed, data

    def _whole_to_all(self, lot: Lot, placed: Arrangement, data: torch.Tensor) -> None:
        """Every rank gets the tensors that each rank has all of, where they stay."""
        self._fill(lot.whole.get((self.rank, ALL), ()), placed.starts, data)
        regions = [(sender, *placed.regions[sender, ALL]) for sender in range(self.world)]
        if placed.even:
            (_, first, size), (_, start, _) = regions[self.rank], regions[0]
            mine = data[first : first + size]
            whole = data[start : start + size * self.world]
            torch.distributed.all_gather_into_tensor(whole, mine if self.in_place else mine.clone())
            return
        for sender, first, size in regions:
            if size:
                torch.distributed.broadcast(data[first : first + size], src=sender)

    def _whole_to_some(self, lot: Lot, placed: Arrangement, data: torch.Tensor | None) -> None:
        """Ranks get tensors that another has all of, where they stay."""
        calls = []
        for pair, own in lot.whole.items():
            sender, receiver = pair
            if sender == self.rank and receiver != ALL:
                starts, nbytes = starts_of([one.spec for one in own])
                wire = self._buffer(nbytes)
                self._fill(own, starts, wire)
                calls.append(torch.distributed.P2POp(torch.distributed.isend, wire, receiver))
            elif receiver == self.rank:
                first, size = placed.regions[pair]
                assert data is not None
                calls.append(torch.distributed.P2POp(torch.distributed.irecv, data[first : first + size], sender))
        for work in torch.distributed.batch_isend_irecv(calls) if calls else ():
            work.wait()

    def _fill(self, own: Sequence[Whole], starts: Mapping[str, int], data: torch.Tensor) -> None:
        """Write tensors that this rank has all of."""
        copies = Copies()
        for one in own:
            into = view_of(data, one.spec, starts[one.spec.name])
            for piece in one.pieces:
                copies.add(part_of(into[piece.box.index], piece), self._values(piece), piece.box.shift)
        copies.run()

    def _step(self, step: Step, outs: Mapping[str, torch.Tensor]) -> None:
        """Bring the pieces of a step into `outs`, tensors by name that this rank receives. Collective."""
        copies = Copies()
        for piece in step.pieces:
            if self.rank in piece.holders and piece.box.tensor in outs:
                into = part_of(outs[piece.box.tensor][piece.box.index], piece)
                copies.add(into, self._values(piece), piece.box.shift)
        copies.run()
        shared = {sender: pieces for (sender, receiver), pieces in step.regions.items() if receiver == ALL}
        if shared:
            self._to_all([shared.get(rank, []) for rank in range(self.world)], outs)
        if len(shared) < len(step.regions):
            self._to_some(step, outs)

    def _to_all(self, regions: Sequence[Sequence[Piece]], outs: Mapping[str, torch.Tensor]) -> None:
        """Every rank gets what each rank has to give."""
        sizes = [extent(pieces) for pieces in regions]
        largest, even = max(sizes), is_even(sizes)
        starts = [largest * rank if even else sum(sizes[:rank]) for rank in range(self.world)]
        wire = self._buffer(largest * self.world if even else sum(sizes))
        mine = wire[starts[self.rank] : starts[self.rank] + (largest if even else sizes[self.rank])]
        self._pack(regions[self.rank], mine)
        if even:
            torch.distributed.all_gather_into_tensor(wire, mine if self.in_place else mine.clone())
        else:
            for sender, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                if size:
                    torch.distributed.broadcast(wire[start : start + size], src=sender)
        for sender, pieces in enumerate(regions):
            if sender != self.rank:
                self._unpack(pieces, wire[starts[sender] :], outs)

    def _to_some(self, step: Step, outs: Mapping[str, torch.Tensor]) -> None:
        """Ranks get what they asked for, from one another."""
        calls, arriving, kept = [], [], []
        for (sender, receiver), pieces in step.regions.items():
            if receiver == ALL or self.rank not in (sender, receiver):
                continue
            wire = self._buffer(extent(pieces))
            if sender == self.rank:
                self._pack(pieces, wire)
                calls.append(torch.distributed.P2POp(torch.distributed.isend, wire, receiver))
                kept.append(wire)
            else:
                calls.append(torch.distributed.P2POp(torch.distributed.irecv, wire, sender))
                arriving.append((pieces, wire))
        for work in torch.distributed.batch_isend_irecv(calls) if calls else ():
            work.wait()
        for pieces, wire in arriving:
            self._unpack(pieces, wire, outs)

    def _buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _values(self, piece: Piece) -> torch.Tensor:
        return part_of(self.live_of(piece.box), piece)

    def _pack(self, pieces: Sequence[Piece], wire: torch.Tensor) -> None:
        copies = Copies()
        for piece, at in places(pieces):
            copies.add(_on_wire(wire, at, piece), self._values(piece), piece.box.shift)
        copies.run()

    def _unpack(self, pieces: Sequence[Piece], wire: torch.Tensor, outs: Mapping[str, torch.Tensor]) -> None:
        copies = Copies()
        for piece, at in places(pieces):
            if piece.box.tensor in outs and self.rank not in piece.holders:
                into = part_of(outs[piece.box.tensor][piece.box.index], piece)
                copies.add(into, _on_wire(wire, at, piece))
        copies.run()


class Copies:
    """Values and where they go, written at once: thousands of small copies in few kernels."""

    def __init__(self) -> None:
        self._dense: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._others: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def add(self, target: torch.Tensor, values: torch.Tensor, shift: int = 0) -> None:
        """Write `values` into `target` when this runs; see `assign`."""
        same = not shift and target.dtype == values.dtype and target.device == values.device
        if same and target.is_contiguous() and values.is_contiguous():
            targets, sources = self._dense.setdefault(target.dtype, ([], []))
            targets.append(target)
            sources.append(values)
        else:
            self._others.append((target, values, shift))

    def run(self) -> None:
        """Write them all."""
        for targets, sources in self._dense.values():
            torch._foreach_copy_(targets, sources)
        for target, values, shift in self._others:
            assign(target, values, shift)


def view_of(data: torch.Tensor, spec: TensorSpec, at: int) -> torch.Tensor:
    """The tensor that begins at a byte of a buffer, uint8."""
    return data[at : at + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def part_of(box: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What a piece takes of its box."""
    return box if piece.part is None else box[piece.part]


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


def _on_wire(wire: torch.Tensor, at: int, piece: Piece) -> torch.Tensor:
    return wire[at : at + piece.nbytes].view(TORCH_DTYPES[piece.dtype]).view(piece.shape)
