"""A lot of an export on the wire: whole tensors land where they stay, pieces of others are packed and put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from converters.torch_casts import TORCH_DTYPES
from mbx.live.course import Course, Gather, Leg, Parcel
from mbx.live.moves import make
from mbx.live.routing import TensorSpec
from mbx.live.shards import Views


class Transport:
    """Carries lots between the ranks of the default process group; `device` is where its buffers lie."""

    def __init__(self, rank: int, device: torch.device, views: Views) -> None:
        self.rank, self.device, self.views = rank, device, views
        self.in_place = device.type != "cpu"

    def carry(self, course: Course) -> torch.Tensor | None:
        """Bring a lot to its receivers; this rank's buffer of it, None where it receives nothing. Collective."""
        data = self._buffer(course.nbytes) if course.nbytes else None
        if data is not None:
            make(course.fills, self.views, data)
            if course.gather is not None:
                self._gather(course.gather, data)
        arriving = [] if data is None else [(peer, data[first : first + size]) for peer, first, size in course.landing]
        if course.sent or arriving:
            self._swap(self._packed(course.sent), arriving)
        for leg in course.legs:
            self._leg(leg, data)
        return data

    def _leg(self, leg: Leg, data: torch.Tensor | None) -> None:
        """Bring the pieces of a step. Collective."""
        if leg.gather is not None:
            wire = self._buffer(leg.nbytes)
            make(leg.pack, self.views, wire)
            self._gather(leg.gather, wire)
            if data is not None:
                make(leg.unpack, None, data, wire)
        if leg.sent or leg.received:
            arriving = [(parcel.peer, self._buffer(parcel.nbytes)) for parcel in leg.received]
            self._swap(self._packed(leg.sent), arriving)
            for parcel, (_, wire) in zip(leg.received, arriving, strict=True):
                assert data is not None
                make(parcel.moves, None, data, wire)

    def _gather(self, gather: Gather, buffer: torch.Tensor) -> None:
        """Every rank gets what each has in its region."""
        if gather.even:
            (first, size), (start, _) = gather.regions[self.rank], gather.regions[0]
            mine = buffer[first : first + size]
            whole = buffer[start : start + size * len(gather.regions)]
            torch.distributed.all_gather_into_tensor(whole, mine if self.in_place else mine.clone())
            return
        for sender, (first, size) in enumerate(gather.regions):
            if size:
                torch.distributed.broadcast(buffer[first : first + size], src=sender)

    def _packed(self, parcels: Sequence[Parcel]) -> list[tuple[int, torch.Tensor]]:
        """What goes to each peer."""
        out = []
        for parcel in parcels:
            wire = self._buffer(parcel.nbytes)
            make(parcel.moves, self.views, wire)
            out.append((parcel.peer, wire))
        return out

    def _swap(self, going: Sequence[tuple[int, torch.Tensor]], coming: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Ranks get what one another has for them alone."""
        calls = [torch.distributed.P2POp(torch.distributed.isend, wire, peer) for peer, wire in going]
        calls += [torch.distributed.P2POp(torch.distributed.irecv, wire, peer) for peer, wire in coming]
        for work in torch.distributed.batch_isend_irecv(calls):
            work.wait()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


def view_of(data: torch.Tensor, spec: TensorSpec, at: int) -> torch.Tensor:
    """The tensor that begins at a byte of a buffer, uint8."""
    return data[at : at + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
