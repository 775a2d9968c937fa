"""One rank of a Megatron Core job with a distributed optimizer: `_optimizer_worker.py RANK WORLD JOB WORKDIR`.

`save` takes a step of Adam on random gradients and stores the run as Megatron-LM's save_checkpoint would: `legacy`
(`torch`, with `distrib_optim.pt`), `full` and `flat` (torch_dist, of the fully_reshardable and the dp_reshardable
kind). `load` loads each folder of WORKDIR/NAME, for every other layout NAME, with Megatron Core, and notes what this
rank's optimizer and weights then hold in `NAME.RANK.pt`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _layout_worker import args_of, legacy_name
from _mcore_configs import QWEN3_MOE
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.checkpoints.optimizer import allocate

CONFIG = {**QWEN3_MOE, "model.vocab_size": 250, "moe_router_dtype": None}
LAYOUTS = {
    "save": {"tp": 2, "pp": 1, "ep": 2, "etp": 2},
    "pipeline": {"tp": 1, "pp": 2, "ep": 2, "etp": 1},
    "tensor": {"tp": 4, "pp": 1, "ep": 2, "etp": 2},
}
ITERATION = 5
ROWS = 252


def trainer(sizes: dict[str, int], seed: int) -> tuple[DistributedDataParallel, Any]:
    """A wrapped model of random weights with Megatron Core's optimizer."""
    torch.manual_seed(seed)
    model = build_model(CONFIG, Spread(**sizes, dtype="bf16"), padded_vocab_size=ROWS)
    wrapping = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config=model.config, ddp_config=wrapping, module=model)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )
    return wrapped, get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=True)


def step(model: DistributedDataParallel, optimizer: Any) -> None:
    """A step on gradients that agree wherever ranks hold the same parameter."""
    for name, parameter in model.module.named_parameters():
        mine = [name]
        if getattr(parameter, "tensor_model_parallel", False):
            mine.append(f"tp{parallel_state.get_tensor_model_parallel_rank()}")
        if ".experts." in name:
            mine.append(f"ep{parallel_state.get_expert_model_parallel_rank()}")
            mine.append(f"etp{parallel_state.get_expert_tensor_parallel_rank()}")
        seed = int.from_bytes(hashlib.sha256("/".join(mine).encode()).digest()[:4], "little")
        random = torch.Generator().manual_seed(seed)
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=random))
    optimizer.step()


def metadata(kind: str) -> dict[str, object]:
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": kind,
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def content(model: DistributedDataParallel, optimizer: Any, kind: str, *, loading: bool) -> dict[str, Any]:
    """What Megatron-LM's generate_state_dict asks for."""
    weights = {"model": model.module.sharded_state_dict(metadata=metadata(kind))}
    state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata(kind))
    return {**weights, "optimizer": state}


def common(sizes: dict[str, int]) -> dict[str, Any]:
    args = argparse.Namespace(**{**vars(args_of(CONFIG, sizes)), "vocab_size": 250, "padded_vocab_size": ROWS})
    args.make_vocab_size_divisible_by = 2
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 12.0,
        "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 40},
    }


def save(work: Path) -> None:
    sizes = LAYOUTS["save"]
    model, optimizer = trainer(sizes, 3)
    step(model, optimizer)
    path = legacy_name(work / "legacy", sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer.save_parameter_state(str(path.parent / "distrib_optim.pt"))
    if parallel_state.get_data_parallel_rank() == 0 or parallel_state.get_expert_data_parallel_rank() == 0:
        state = {"model": model.module.state_dict_for_save_checkpoint(), "optimizer": optimizer.state_dict()}
        streams = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}]
        torch.save({**common(sizes), **state, "rng_state": streams}, path)
    for folder, kind in (("full", "fully_reshardable"), ("flat", "dp_reshardable")):
        target = work / folder / f"iter_{ITERATION:07d}"
        if torch.distributed.get_rank() == 0:
            target.mkdir(parents=True)
        torch.distributed.barrier()
        stored = {**common(sizes), **content(model, optimizer, kind, loading=False)}
        stored["content_metadata"] = {k: v for k, v in metadata(kind).items() if k != "dp_cp_group"}
        dist_checkpointing.save(stored, str(target), ("torch_dist", 1))
    if torch.distributed.get_rank() == 0:
        for folder in ("legacy", "full", "flat"):
            (work / folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def held(model: DistributedDataParallel, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights, masters and moments of this rank by name, and the step."""
    found = {name: value.clone() for name, value in model.module.named_parameters()}
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    for one in optimizer.chained_optimizers:
        for parameter in one.model_param_gbuf_map:
            for kind, value in one._get_main_param_and_optimizer_states(parameter).items():
                found[f"{kind} {names[parameter]}"] = value.clone()
        for number, group in enumerate(one.optimizer.param_groups):
            first = sorted(names[parameter] for parameter in one.model_param_gbuf_map)[0]
            found[f"step {number} {first}"] = torch.tensor(float(group.get("step", 0)))
    return found


def load(name: str, work: Path) -> None:
    sizes = LAYOUTS[name]
    found = {}
    for folder in sorted((work / name).iterdir()):
        model, optimizer = trainer(sizes, 4)
        allocate(optimizer)
        asked = content(model, optimizer, "fully_reshardable", loading=True)
        loaded = dist_checkpointing.load(asked, str(next(folder.resolve().glob("iter_*"))))
        model.module.load_state_dict(loaded["model"], strict=True)
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
        for one in optimizer.chained_optimizers:  # a counter each, which loading leaves with the group
            for group in one.optimizer.param_groups:
                for parameter in group["params"]:
                    one.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
        found[folder.name] = held(model, optimizer)
    fresh, optimizer = trainer(sizes, 4)
    allocate(optimizer)
    found["fresh"] = held(fresh, optimizer)
    torch.save(found, work / f"{name}.{torch.distributed.get_rank()}.pt")


def without_cuda() -> None:
    """The distributed optimizer tells parameters by CUDA's type names, and puts its scalars on the GPU."""
    plain_type, tensor, zeros = torch.Tensor.type, torch.tensor, torch.zeros

    def type_of(self: torch.Tensor, *to: Any, **more: Any) -> Any:
        found = plain_type(self, *to, **more)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    def on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *a, **k: make(*a, **{**k, "device": "cpu"} if k.get("device") == "cuda" else k)

    # Megatron Core loads what Transformer Engine's Adam has; torch's has a step beside each parameter's moments.
    put = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = (  # type: ignore[method-assign]
        lambda self, parameter, states: put(self, parameter, {"step": tensor(0.0), **states})
    )
    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.tensor, torch.zeros = on_cpu(tensor), on_cpu(zeros)


def main(job: str, rank: int, world: int, work: Path) -> None:
    torch.set_num_threads(1)
    without_cuda()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name in ["save"] if job == "save" else [name for name in LAYOUTS if name != "save"]:
        meeting = work / f"{name}.store"
        with megatron_on_cpu(), process_group(Spread(**LAYOUTS[name]), rank=rank, world_size=world, init_file=meeting):
            save(work) if job == "save" else load(name, work)
            torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[3], int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]))
