"""What changed in a live model since a moment, in Hugging Face's coordinates; each rank says it of what it owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from converters.errors import UsageError
from mbx.live.exchange import ChunkId
from mbx.live.held import Held

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The values of a rank's own shards at a moment, in host memory; `of` tells the attachment that it is of."""

    of: object
    shards: Mapping[ChunkId, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Delta:
    """Elements of the tensor `name`, of `shape`, that changed: `indices` into it as one row, int64, and new `values`.

    Both are one-dimensional, and of one box of the tensor: another box, or rank, may have more of it.
    """

    name: str
    shape: tuple[int, ...]
    indices: torch.Tensor
    values: torch.Tensor


def changes(pairs: Iterable[tuple[Held, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Delta]:
    """Deltas of boxes, each with what it was; bits are compared, as the folder would hold them."""
    for now, before in pairs:
        new = now.values()
        old = replace(now, view=before.to(new.device)).values()
        if new.shape != old.shape or new.dtype != old.dtype:
            raise UsageError(f"`{now.name}` is of another shape or dtype than when the snapshot was taken")
        word = _WORDS[new.element_size()]
        places = (new.view(word) != old.view(word)).nonzero(as_tuple=False)
        if not len(places) and now.view.dim():
            continue
        shape = shapes[now.name]
        flat = torch.zeros(len(places), dtype=torch.int64, device=places.device)
        for dim, part in enumerate(now.index):
            flat += (places[:, dim] * part.step + part.start) * prod(shape[dim + 1 :])
        if len(flat):
            yield Delta(now.name, shape, flat, new[tuple(places.t())].reshape(-1))
