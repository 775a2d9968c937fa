"""One step of an export on the wire: pieces are packed, sent in few calls, and put where they belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from converters.engine.boxes import Box
from converters.errors import UsageError
from converters.torch_casts import TORCH_DTYPES
from mbx.live.routing import ALL, Piece, Step, extent, is_even, places

#: The live memory of a box, in the box's shape.
ViewOf = Callable[[Box], torch.Tensor]


class Transport:
    """Carries steps between the ranks of the default process group; `device` is where its buffers lie."""

    def __init__(self, rank: int, world: int, device: torch.device, view_of: ViewOf) -> None:
        self.rank, self.world, self.device, self.view_of = rank, world, device, view_of
        self.in_place = torch.distributed.get_backend() != "gloo"

    def carry(self, step: Step, outs: Mapping[str, torch.Tensor]) -> None:
        """Bring the pieces of a step into `outs`, whole tensors by name: empty on ranks that get none. Collective."""
        for piece in step.pieces:
            if self.rank in piece.holders and piece.box.tensor in outs:
                assign(part_of(outs[piece.box.tensor][piece.box.index], piece), self._values(piece), piece.box.shift)
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
        return part_of(self.view_of(piece.box), piece)

    def _pack(self, pieces: Sequence[Piece], wire: torch.Tensor) -> None:
        for piece, at in places(pieces):
            assign(_on_wire(wire, at, piece), self._values(piece), piece.box.shift)

    def _unpack(self, pieces: Sequence[Piece], wire: torch.Tensor, outs: Mapping[str, torch.Tensor]) -> None:
        for piece, at in places(pieces):
            if piece.box.tensor in outs and self.rank not in piece.holders:
                part_of(outs[piece.box.tensor][piece.box.index], piece).copy_(_on_wire(wire, at, piece))


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
