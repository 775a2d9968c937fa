"""One of two processes that save or load DTensors with torch itself: `_fsdp_worker.py JOB RANK WORLD FOLDER`.

`load` fills DTensors from the fsdp_dtensor checkpoint FOLDER/made, as Megatron-LM's loader does, and rank 0 writes the
whole tensors to `loaded.pt`. `save` shards the tensors of `wanted.pt` over both ranks and saves FOLDER/theirs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, empty


def load(work: Path) -> None:
    folder = work / "made/iter_0000000"
    # As Megatron-LM reads the arguments, before it builds the model.
    head = {"args": None, "iteration": None, "checkpoint_version": None}
    dcp.load(head, checkpoint_id=folder)
    mesh = init_device_mesh("cpu", (2,))
    wanted = torch.load(work / "wanted.pt", weights_only=True)
    model = {
        name: empty(tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, tensor in wanted.items()
    }
    dcp.load({"model": model}, storage_reader=dcp.FileSystemReader(folder))
    whole = {name: tensor.full_tensor() for name, tensor in model.items()}
    if torch.distributed.get_rank() == 0:
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        torch.save({"model": whole, "names": sorted(stored), "args": vars(head["args"]), **head}, work / "loaded.pt")


def save(work: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    wanted = torch.load(work / "wanted.pt", weights_only=True)
    model = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in wanted.items()}
    # A buffer without a mesh axis, and an optimizer's state, as Megatron-FSDP saves them.
    for name in [name for name in model if name.endswith("expert_bias")]:
        model[name] = DTensor.from_local(wanted[name], mesh, [Replicate()], run_check=False)
    name = next(name for name in model if name.endswith("_w"))
    state = {"state": {f"module.module.{name}": {"exp_avg": model[name]}}, "param_groups": [{"lr": 0.1}]}
    everything = {"model": model, "optimizer": state, "iteration": 7, "checkpoint_version": 3.0}
    everything["args"] = argparse.Namespace(**torch.load(work / "args.pt", weights_only=True))
    dcp.save(everything, storage_writer=dcp.FileSystemWriter(work / "theirs/iter_0000007"))


def main(job: str, rank: int, world: int, work: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{work / job}.store", rank=rank, world_size=world)
    {"load": load, "save": save}[job](work)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[3], int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]))
