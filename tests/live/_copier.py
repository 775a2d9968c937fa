"""Fifty lines that move a model between two layouts by boxes alone: who knows nothing else of either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from mbx.live import Held


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and its values."""

    name: str
    index: tuple[slice, ...]
    values: torch.Tensor


def sent(held: Iterable[Held]) -> list[Part]:
    """What a rank of the source gives: its own boxes."""
    return [Part(one.name, one.index, one.values().clone()) for one in held if not one.replica]


def copy(parts: Iterable[Part], held: Iterable[Held]) -> int:
    """Write whatever of `parts` meets the boxes of a rank of the target; returns the elements written."""
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    written = 0
    for mine in held:
        values = mine.values().clone()
        for part in by_name.get(mine.name, ()):
            if (meeting := _meeting(part.index, mine.index)) is not None:
                theirs, own = meeting
                values[own] = part.values[theirs]
                written += values[own].numel()
        mine.fill(values)
    return written


def _meeting(a: tuple[slice, ...], b: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes meet, in the coordinates of each; steps are equal, where there are any."""
    pairs = list(_dims(a, b))
    return None if None in pairs else (tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))  # type: ignore[index]


def _dims(a: tuple[slice, ...], b: tuple[slice, ...]) -> Iterator[tuple[slice, slice] | None]:
    for one, other in zip(a, b, strict=True):
        step = max(one.step, other.step)
        low, high = max(one.start, other.start), min(one.stop, other.stop)
        if low >= high or (one.start - other.start) % step:
            yield None
            return
        yield tuple(slice((low - s.start) // s.step, (high - 1 - s.start) // s.step + 1) for s in (one, other))
