"""Buckets of tensors on their way: made of what ranks hold, and brought to those who receive them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch

from converters.engine.boxes import Box
from converters.errors import UsageError
from converters.tensors import DTYPE_BITS
from mbx.live.course import Course, course_of
from mbx.live.exchange import World
from mbx.live.held import Held
from mbx.live.moves import Typed
from mbx.live.routing import TensorSpec, lots
from mbx.live.shards import Values, Views
from mbx.live.transport import Transport

#: Who receives: every rank, the first rank of each pipeline stage what its stage holds, or one rank.
To = Literal["all", "stage"] | int
#: The ranks that get a tensor, by its name.
Receivers = Callable[[str], tuple[int, ...]]
#: The boxes that make a tensor, by its name.
Boxes = Mapping[str, Sequence[Box]]
BUCKET = 1 << 30
#: How many kinds of exports are remembered as they were worked out.
_KEPT = 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that arrive together in one buffer, `data`, uint8, on the ranks that receive any of them.

    `tensors` says what it holds: each with the byte at which it begins, None where another rank receives it. Another
    process that is given the buffer finds them by that alone.
    """

    tensors: tuple[tuple[TensorSpec, int | None], ...]
    data: torch.Tensor | None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Names and tensors: views of `data`."""
        typed = None if self.data is None else Typed(self.data)
        for spec, at in self.tensors:
            if typed is None or at is None:
                yield spec.name, None
                continue
            whole, first = typed[spec.dtype], at * 8 // DTYPE_BITS[spec.dtype]
            yield spec.name, whole[first : first + prod(spec.shape)].view(spec.shape)

    def held(self) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """The tensors that this rank receives."""
        for (spec, _), (_, tensor) in zip(self.tensors, self, strict=True):
            if tensor is not None:
                yield spec, tensor


class Holder(Protocol):
    """What gives a rank's shards, and says where their copies go."""

    def views(self, values: Values | None = None) -> Views: ...

    def device(self) -> torch.device: ...


class Sender:
    """Makes whole tensors of what the ranks of `world` hold of `model`, and sends them."""

    def __init__(self, model: Holder, world: World) -> None:
        self._model, self._world = model, world
        self._kept: dict[Hashable, tuple[Course, ...]] = {}

    def giving(self, model: Holder) -> Sender:
        """The same ranks and what was worked out for them, of the shards that another holder gives."""
        other = Sender(model, self._world)
        other._kept = self._kept
        return other

    def views(self, values: Values | None = None) -> Callable[[Box], torch.Tensor]:
        """Access to the live memory of boxes that this rank holds; UsageError where the model was rebuilt."""
        views = self._model.views(values)

        def view(box: Box) -> torch.Tensor:
            return in_shape(views[self._world.mine[box.source, box.chunk][0]], box)

        return view

    def held(self, specs: Iterable[TensorSpec], boxes: Boxes, values: Values | None = None) -> Iterator[Held]:
        """What this rank holds of some tensors, box by box. Nothing is sent or copied."""
        view = self.views(values)
        for spec in specs:
            for box in boxes[spec.name]:
                place = box.source, box.chunk
                if place in self._world.mine:
                    replica = not self._world.owned(place)
                    yield Held(spec.name, box.index, view(box), replica, spec.dtype, box.shift)

    def buckets(
        self,
        boxes: Boxes,
        specs: Sequence[TensorSpec],
        receivers: Receivers,
        bucket: int = BUCKET,
        values: Values | None = None,
        key: Hashable = None,
    ) -> Iterator[Bucket]:
        """Tensors, a bucket at a time, to those who get them; what was worked out is kept by a `key`. Collective."""
        if bucket < 1:
            raise UsageError(f"a bucket cannot be {bucket} bytes")
        transport = Transport(self._world.rank, self._model.device(), self._model.views(values))
        for course in self._courses(boxes, specs, receivers, bucket, key):
            with torch.no_grad():
                data = transport.carry(course)
            yield Bucket(course.tensors, data)

    def _courses(
        self, boxes: Boxes, specs: Sequence[TensorSpec], receivers: Receivers, bucket: int, key: Hashable
    ) -> Iterator[Course]:
        """What this rank does, lot by lot: as it was worked out for a key, of which the last few are kept."""
        if key is not None and key in self._kept:
            yield from self._kept[key]
            return
        made: list[Course] = []
        for lot in lots(specs, boxes, self._world.holders, receivers, self._world.size, bucket):
            course = course_of(lot, self._world)
            made.append(course)
            yield course
        if key is not None:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = tuple(made)

    def receivers(self, boxes: Boxes, to: To) -> Receivers:
        """Ranks that get a tensor, by its name."""
        everyone = tuple(range(self._world.size))
        if to == "all":
            return lambda name: everyone
        if to == "stage":
            heads = self._world.heads
            stages = self._world.stages

            def head(name: str) -> tuple[int, ...]:
                first = boxes[name][0]
                return (heads[stages[self._world.holders[first.source, first.chunk][0]]],)

            return head
        if not isinstance(to, int) or isinstance(to, bool) or not 0 <= to < self._world.size:
            raise UsageError(f"‹to› {to!r} is not known", hint=f'choices: "all", "stage", 0 to {self._world.size - 1}')
        return lambda name: (to,)

    def one_each(self, boxes: Boxes, specs: Sequence[TensorSpec]) -> Receivers:
        """A rank for each tensor, which holds some of it where it can be, so that all have as many bytes to handle."""
        loads, out = [0] * self._world.size, {}
        for spec in specs:
            having = {rank for box in boxes[spec.name] for rank in self._world.holders[box.source, box.chunk]}
            out[spec.name] = min(having, key=lambda rank: (loads[rank], rank))
            loads[out[spec.name]] += spec.nbytes
        return lambda name: (out[name],)

    def each_at_one(
        self, boxes: Boxes, specs: Sequence[TensorSpec], bucket: int = BUCKET, values: Values | None = None
    ) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Every tensor whole, on one rank each; this rank's. Collective."""
        for got in self.buckets(boxes, specs, self.one_each(boxes, specs), bucket, values):
            yield from got.held()


def in_shape(whole: torch.Tensor, box: Box) -> torch.Tensor:
    """What a box picks of its chunk's memory, in the box's shape; no copy."""
    view = whole[box.held]
    return (view.t() if box.transposed else view).view(box.shape)
