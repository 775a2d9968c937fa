"""Parts of tensors that a codec encodes by themselves: whole blocks that the same ranks hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from converters.codecs.decode import Encoded
from converters.engine.boxes import Box, Index, sizes_of
from converters.tensors import Shape
from mbx.live.exchange import World
from mbx.live.moves import contiguous
from mbx.live.shards import Shard

#: Before the names of parts where keys of Megatron Core stand, none of which begins so.
_MARK = "codes:"


@dataclass(frozen=True, slots=True)
class Cut:
    """Whole blocks of a tensor that the same ranks hold: `index` picks them, `boxes` make them.

    `gives` are the parts that are taken from it, by role, each with where it lies in the whole tensor's.
    """

    encoded: Encoded
    index: Index
    boxes: tuple[Box, ...]
    gives: Mapping[str, Index]


@dataclass(frozen=True, slots=True)
class CodedShard(Shard):
    """A part of a cut, which is computed where it is asked for, of shards that this rank holds."""

    cut: Cut
    role: str
    held: tuple[Shard, ...]


def cuts_of(
    encoded: Encoded, boxes: Sequence[Box], world: World, kept: Collection[str]
) -> tuple[tuple[Cut, ...], bool]:
    """The cuts that make a tensor, one for each set of ranks, and whether their largest magnitudes decide one scale.

    None where some element of a part is made of several cuts, and that is no scale that magnitudes decide. `kept` are
    the parts that are the source's.
    """
    groups: dict[frozenset[int], list[Box]] = {}
    for box in boxes:
        groups.setdefault(frozenset(world.holders[box.source, box.chunk]), []).append(box)
    found = [(_around(group), group) for group in groups.values()]
    if any(prod(sizes_of(index)) != sum(prod(box.shape) for box in group) for index, group in found):
        return (), False
    codec, shape = encoded.codec, encoded.tensor.shape
    crossed = {
        role for role in encoded.parts for index, _ in found if not _alone(codec.grain(role, shape), index, shape)
    }
    crossed -= set(codec.constant_parts).intersection(kept)
    shared = not kept and crossed == {codec.maxima_role}
    if crossed and not shared:
        return (), False
    given = {role: set[Shape]() for role in encoded.parts}
    cuts = []
    for index, group in found:
        gives = {}
        for role, seen in given.items():
            part = part_index(encoded, role, index)
            place = tuple(one.start for one in part)
            if place not in seen:  # cuts side by side have the scales of the same rows
                seen.add(place)
                gives[role] = part
        cuts.append(Cut(encoded, index, tuple(group), gives))
    for role, stored in encoded.parts.items():
        if sum(prod(sizes_of(cut.gives[role])) for cut in cuts if role in cut.gives) != prod(stored.shape):
            return (), False
    return tuple(cuts), shared


def _around(boxes: Sequence[Box]) -> Index:
    """The least box, in steps of one, around boxes, which is theirs alone where it has no more elements."""
    every = zip(*([range(part.start, part.stop, part.step) for part in box.index] for box in boxes), strict=True)
    return tuple(slice(min(own[0] for own in dim), max(own[-1] for own in dim) + 1, 1) for dim in every)


def _alone(grain: Shape | None, index: Index, shape: Shape) -> bool:
    """Whether a box begins and ends where elements of a part do."""
    return grain is not None and all(
        not part.start % size and (part.stop == whole or not part.stop % size)
        for part, size, whole in zip(index, grain, shape, strict=True)
    )


def part_index(encoded: Encoded, role: str, index: Index) -> Index:
    """Where the part of a box lies in the whole tensor's."""
    box = tuple((part.start, part.stop) for part in index)
    return tuple(slice(*span, 1) for span in encoded.codec.part_box(role, box, encoded.tensor.shape))


def held_of(cut: Cut, world: World) -> tuple[Shard, ...]:
    """This rank's shards of a cut's boxes; none where it lies on others."""
    places = [(box.source, box.chunk) for box in cut.boxes]
    return tuple(world.mine[place][0] for place in places) if world.rank in world.holders[places[0]] else ()


def placed(cut: Cut, number: int, world: World) -> Iterator[tuple[Box, CodedShard | None, tuple[int, ...]]]:
    """The box of each part that a cut gives, the shard that has it on this rank, and the ranks that can."""
    having, held = world.holders[cut.boxes[0].source, cut.boxes[0].chunk], held_of(cut, world)
    for role, index in cut.gives.items():
        part = cut.encoded.parts[role]
        sizes, key, shard = sizes_of(index), _MARK + part.name, None
        if held:
            offsets = tuple(one.start for one in index)
            own = (key, part.dtype, part.shape, offsets, sizes, 0, world.rank == having[0])
            shard = CodedShard(*own, held[0].chunk, part.name, contiguous(sizes), 0, cut, role, held)
        yield Box(part.name, index, key, number, tuple(slice(0, size, 1) for size in sizes)), shard, having
