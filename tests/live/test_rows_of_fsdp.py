"""Shards of whole parameters, cut to the rows that ranks have: each element once, where it was."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as ByDimension
from torch.distributed.tensor import distribute_tensor

from converters.errors import UnsupportedError
from mbx.live import fsdp
from mbx.live.fsdp import Rows
from mbx.live.shards import Shard, view_of_shard
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group

WHOLE = torch.arange(12 * 6).view(12, 6)
#: Views as Megatron Core takes of a parameter, by what they are of.
VIEWS = {
    "all of it": WHOLE,
    "gate": WHOLE.chunk(2)[0],
    "up": WHOLE.chunk(2)[1],
    "every third row": WHOLE[1::3],
    "one row": WHOLE[5:6],
    "columns": WHOLE[:, 2:4],
    "columns of some": WHOLE[3:9, 1:],
    "an element": WHOLE[7:8, 3:4],
}


def shard_of(view: torch.Tensor) -> Shard:
    sizes, first = tuple(view.shape), int(view.storage_offset())
    return Shard("key", "I64", sizes, (0, 0), sizes, 0, True, 0, "name", tuple(view.stride()), first)


@pytest.mark.parametrize("edges", [(0, 6, 12), (0, 5, 10, 12), (0, 1, 2, 3, 4, 12), (0, 0, 12, 12)])
@pytest.mark.parametrize("what", VIEWS)
def test_every_element_is_in_one_rank(what: str, edges: tuple[int, ...]) -> None:
    found = torch.full(VIEWS[what].shape, -1)
    for first, last in zip(edges, edges[1:], strict=False):
        part = Rows((12, 6), first, last, True).of(shard_of(VIEWS[what]), main=True)
        if part is None:
            continue
        own = WHOLE[first:last].clone()
        where = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
        assert (found[where] == -1).all()
        found[where] = view_of_shard(own, part)
    assert torch.equal(found, VIEWS[what])


def test_vectors_are_cut_by_elements() -> None:
    vector = Shard("key", "I64", (2, 5), (1, 0), (1, 5), 1, True, 0, "name", (1,), 0)
    part = Rows((5,), 2, 4, False).of(vector, main=True)
    assert part is not None
    assert (part.offsets, part.sizes, part.first, part.main) == ((1, 2), (1, 2), 0, False)


@pytest.mark.parametrize("view", [WHOLE.view(-1)[3:9][None], WHOLE.view(3, 4, 6)[:, :2]])
def test_what_lies_across_rows_is_refused(view: torch.Tensor) -> None:
    shard = Shard("key", "I64", view.shape, (0,) * view.dim(), view.shape, 0, True, 0, "name", view.stride(), 3)
    with pytest.raises(UnsupportedError, match="across its rows"):
        Rows((12, 6), 0, 6, True).of(shard, main=True)


def test_other_cuts_are_refused() -> None:
    with megatron_on_cpu(), process_group():
        mesh = init_device_mesh("cpu", (1,))
        columns = distribute_tensor(torch.zeros(4, 4), mesh, [ByDimension(1)])
        with pytest.raises(UnsupportedError, match="not cut by rows alone"):
            fsdp.rows_of("weight", columns)
        uneven = distribute_tensor(torch.zeros(4, 4), mesh, [ByDimension(0)])
        uneven._local_tensor = uneven._local_tensor[:3]
        with pytest.raises(UnsupportedError, match="Megatron-FSDP"):
            fsdp.rows_of("weight", uneven)
