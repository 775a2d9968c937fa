"""One rank of live models: `_worker.py RANK WORLD WORK CASE…`, a case being [JOB@]FAMILY:tp=2,ep=2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from _coded import CODED
from _jobs import JOBS
from _models import build, fill, read_folder, same_bytes

from mbx.live import attach
from mbx.models.device import Spread
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group

CALLS = ("all_gather_into_tensor", "broadcast", "batch_isend_irecv", "all_gather_object", "all_gather", "all_reduce")
SMALL_BUCKET = 4096


class Counted:
    """Counts calls of torch.distributed while it lasts."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = dict.fromkeys(CALLS, 0)
        self._patches = [patch.object(torch.distributed, name, self._counting(name)) for name in CALLS]

    def _counting(self, name: str):
        plain = getattr(torch.distributed, name)

        def call(*args: object, **named: object) -> object:
            self.calls[name] += 1
            return plain(*args, **named)

        return call

    def __enter__(self) -> Counted:
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()

    @property
    def total(self) -> int:
        return sum(self.calls.values())


def unequal(stream, folder: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Names in their order, and those whose tensors are not the folder's."""
    names, odd = [], []
    for name, tensor in stream:
        names.append(name)
        if tensor is not None and (name not in folder or not same_bytes(tensor, folder[name])):
            odd.append(name)
    return names, odd


def exported(family: str, spread: Spread, work: Path) -> dict[str, object]:
    """The stream in every direction, against the folder."""
    chunks = build(work / family, spread)
    fill(chunks, work / f"{family}.mcore")
    return streamed(chunks, family, work)


def cut(family: str, spread: Spread, work: Path) -> dict[str, object]:
    """The same of a model whose parameters Megatron Core has FSDP cut; and filled, from a folder and by tensors."""
    chunks = build(work / family, spread)
    fill(chunks, work / f"{family}.mcore")
    sharded = [by_fsdp(chunk) for chunk in chunks]
    found = streamed(sharded, family, work)
    live, folder = attach(sharded, work / family), read_folder(work / family)
    cut = [p for chunk in chunks for p in chunk.parameters() if type(p.data).__name__ == "DTensor"]
    found["cut"] = [len(cut), sum(p._local_tensor.numel() for p in cut), sum(p.numel() for p in cut)]
    for name, source in (("folder", work / family), ("mcore", work / f"{family}.mcore"), ("pairs", folder.items())):
        with torch.no_grad():
            for parameter in cut:
                parameter._local_tensor.uniform_(-3, 3)
        found[f"scrambled_{name}"] = len(unequal(live.export(), folder)[1])
        live.load(source)
        found[f"odd_{name}"] = unequal(live.export(), folder)[1]
    return found


def by_fsdp(chunk: torch.nn.Module) -> torch.nn.Module:
    """A chunk in Megatron Core's own wrapper, whose mesh is of GPUs."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed import torch_fully_sharded_data_parallel as wrapper

    mesh = wrapper.DeviceMesh.from_group
    with patch.object(wrapper.DeviceMesh, "from_group", lambda group, _: mesh(group, "cpu")):
        return wrapper.TorchFullyShardedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)


def streamed(chunks: list[torch.nn.Module], family: str, work: Path) -> dict[str, object]:
    with Counted() as attaching:
        live = attach(chunks, work / family)
    folder = read_folder(work / family)
    found: dict[str, object] = {"attach": attaching.calls, "left_out": live.left_out, "folder": sorted(folder)}
    with Counted() as asking, _no_allocation():
        specs = live.spec()
        found["spec"] = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    found["spec_calls"] = asking.total
    with Counted() as sending:
        found["names"], found["odd"] = unequal(live.export(), folder)
    found["calls"], found["buckets"] = sending.total, len(list(live.buckets()))
    found["again"], found["odd_small"] = unequal(live.export(SMALL_BUCKET), folder)
    got: dict[str, list[str]] = {}
    for to in ("stage", torch.distributed.get_world_size() - 1):
        pairs = list(live.export(SMALL_BUCKET, to=to))
        got[str(to)] = [name for name, tensor in pairs if tensor is not None]
        found[f"odd_to_{to}"] = unequal(iter(pairs), folder)[1]
    found["got"] = got
    found["digest"] = live.digest(bucket=SMALL_BUCKET)
    covered = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in folder.items()}
    wrong = []
    for held in live.local():
        if not held.replica:
            covered[held.name][held.index] += 1
        if not same_bytes(held.values(), folder[held.name][held.index]):
            wrong.append(held.name)
        if held.offsets != tuple(part.start for part in held.index) or held.sizes != tuple(held.view.shape):
            wrong.append(f"{held.name}: {held.offsets}")
    for counts in covered.values():
        torch.distributed.all_reduce(counts)
    found["wrong"] = wrong
    found["covered"] = sorted(name for name, counts in covered.items() if not bool((counts == 1).all()))
    return found


def _no_allocation():
    """Torch may allocate nothing meanwhile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"{function} ran")

    return Refusing()


def main(rank: int, world: int, work: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    for case in cases:
        where, _, axes = case.partition(":")
        job, _, family = where.rpartition("@")
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in axes.split(",") if part)}
        meeting = work / f"{case}.store"
        with megatron_on_cpu(), process_group(Spread(**sizes), rank=rank, world_size=world, init_file=meeting):
            found = {**JOBS, **CODED, "": exported, "cut": cut}[job](family, Spread(**sizes, dtype="bf16"), work)
            (work / f"{case}.{rank}.json").write_text(json.dumps(found))
            torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
