"""A model copied into another by boxes alone, shard to shard: a route is made once, and taken at every step.

Both sides say what they hold (`Live.local`), the ranks exchange that, and each pair of ranks then knows what one sends
the other. Nobody holds a whole tensor, and nothing else of either model is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mbx.live import Held
from mbx.live.exchange import gather_objects
from mbx.live.moves import Copies

Index = tuple[slice, ...]
_ALIGNED = 256
_Told = list[tuple[str, Index]]


@dataclass
class Lot:
    """What one rank sends another at once: values of the sender's, or the receiver's memory, and their wire."""

    live: list[torch.Tensor] = field(default_factory=list)
    wire: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0


class Route:
    """From `source`, what this rank holds of one model, to `target`, what it holds of another; collective.

    Both models keep their memory from here on. `bucket` bounds what a rank sends another at once, in bytes.
    """

    def __init__(self, source: Iterable[Held], target: Iterable[Held], bucket: int = 256 << 20) -> None:
        mine, theirs = list(source), list(target)
        told: list[tuple[_Told, _Told]] = gather_objects(
            ([(h.name, h.index) for h in mine], [(h.name, h.index) for h in theirs])
        )
        self.rank, self.bucket = torch.distributed.get_rank(), bucket
        device = theirs[0].view.device
        self.wires = [torch.empty(bucket, dtype=torch.uint8, device=device) for _ in range(2 * len(told))]
        self.lots: dict[tuple[int, int], list[Lot]] = {}
        self.elements = 0
        having: dict[str, list[tuple[int, int, Index]]] = {}
        for rank, (held, _) in enumerate(told):
            for number, (name, index) in enumerate(held):
                having.setdefault(name, []).append((rank, number, index))
        for receiver, (_, wanted) in enumerate(told):
            for number, (name, index) in enumerate(wanted):
                for sender, at, part in _sources(having[name], receiver, index):
                    if (meeting := _meeting(part, index)) is None:
                        continue
                    give = mine[at].view[meeting[0]] if sender == self.rank else None
                    take = theirs[number].view[meeting[1]] if receiver == self.rank else None
                    self._add(sender, receiver, give, take)
        self.steps = max((len(lots) for pair, lots in self.lots.items() if pair[0] != pair[1]), default=0)

    def _add(self, sender: int, receiver: int, give: torch.Tensor | None, take: torch.Tensor | None) -> None:
        held = give if give is not None else take
        if held is None:
            return
        self.elements += 0 if take is None else take.numel()
        lots = self.lots.setdefault((sender, receiver), [Lot()])
        if sender == receiver:
            assert give is not None and take is not None
            lots[0].live.append(take)
            lots[0].wire.append(give)
            return
        if held.nbytes > self.bucket:
            half = held.shape[0] // 2
            for part in (slice(0, half), slice(half, None)):
                self._add(
                    sender,
                    receiver,
                    give[part] if give is not None else None,
                    take[part] if take is not None else None,
                )
            self.elements -= 0 if take is None else take.numel()
            return
        if lots[-1].nbytes + held.nbytes > self.bucket:
            lots.append(Lot())
        lot, wire = lots[-1], self.wires[2 * (receiver if give is not None else sender) + (give is None)]
        lot.live.append(held)
        lot.wire.append(wire[lot.nbytes : lot.nbytes + held.nbytes].view(held.dtype).view(held.shape))
        lot.nbytes += -(-held.nbytes // _ALIGNED) * _ALIGNED

    def copy(self) -> None:
        """Bring the values of the source, as they are now, into the target. Collective."""
        with torch.no_grad():
            for lot in self.lots.get((self.rank, self.rank), ()):
                _copy(lot.live, lot.wire)
            for step in range(self.steps):
                self._step(
                    [(pair, lots[step]) for pair, lots in self.lots.items() if pair[0] != pair[1] and step < len(lots)]
                )

    def _step(self, lots: Sequence[tuple[tuple[int, int], Lot]]) -> None:
        calls = []
        for (sender, receiver), lot in lots:
            gives = sender == self.rank
            wire = self.wires[2 * (receiver if gives else sender) + (not gives)][: lot.nbytes]
            if gives:
                _copy(lot.wire, lot.live)
            move = torch.distributed.isend if gives else torch.distributed.irecv
            calls.append(torch.distributed.P2POp(move, wire, receiver if gives else sender))
        for work in torch.distributed.batch_isend_irecv(calls) if calls else ():
            work.wait()
        for (sender, _), lot in lots:
            if sender != self.rank:
                _copy(lot.live, lot.wire)


def _copy(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    copies = Copies()
    for target, value in zip(targets, values, strict=True):
        copies.add(target, value)
    copies.run()


def _sources(
    having: Sequence[tuple[int, int, Index]], receiver: int, index: Index
) -> Iterator[tuple[int, int, Index]]:
    """Boxes that make up a wanted one, each element from one rank: the receiver's own where it has any that meet."""
    seen: list[Index] = []
    for sender, number, part in sorted(having, key=lambda box: box[0] != receiver):
        if _meeting(part, index) is not None and part not in seen:
            seen.append(part)
            yield sender, number, part


def _meeting(a: Index, b: Index) -> tuple[Index, Index] | None:
    """Where two boxes meet, in the coordinates of each; steps are equal, where there are any."""
    pairs: list[tuple[slice, slice]] = []
    for one, other in zip(a, b, strict=True):
        step = max(one.step, other.step)
        low, high = max(one.start, other.start), min(one.stop, other.stop)
        if low >= high or (one.start - other.start) % step:
            return None
        pairs.append(tuple(slice((low - s.start) // s.step, (high - 1 - s.start) // s.step + 1) for s in (one, other)))  # type: ignore[arg-type]
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
