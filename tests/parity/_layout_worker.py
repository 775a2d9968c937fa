"""One rank of a Megatron Core job about layouts: `_layout_worker.py RANK WORLD JOB WORKDIR`.

`save` builds models of random weights and stores each twice: as torch_dist by Megatron Core, and as the files
that Megatron-LM's `--ckpt-format torch` would write. `load` loads what mbx made of them and compares every
tensor with what `save` had; each rank writes its findings to `load.RANK.pt`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _mcore_configs import QWEN3_MOE, SMALL
from megatron.core import dist_checkpointing, parallel_state
from torch import nn

from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.config import FlatConfig
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from tests.judge import load_torch_dist, save_torch_dist

MODELS: dict[str, tuple[FlatConfig, dict[str, int]]] = {
    "dense": ({**SMALL, "num_layers": 4}, {"tp": 2, "pp": 2, "ep": 1, "etp": 2}),
    "tied": (
        {**SMALL, "num_layers": 4, "model.share_embeddings_and_output_weights": True},
        {"tp": 1, "pp": 4, "ep": 1, "etp": 1},
    ),
    "moe": (QWEN3_MOE, {"tp": 2, "pp": 1, "ep": 2, "etp": 2}),
    "moe_etp1": (QWEN3_MOE, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    # two ranks to a key and value head
    "few_groups": ({**SMALL, "num_query_groups": 2}, {"tp": 4, "pp": 1, "ep": 1, "etp": 4}),
    "interleaved": (
        {**SMALL, "num_layers": 8, "mtp_num_layers": 1, "virtual_pipeline_model_parallel_size": 2},
        {"tp": 2, "pp": 2, "ep": 1, "etp": 2},
    ),
}


def legacy_name(root: Path, sizes: dict[str, int]) -> Path:
    """Where this rank's file lies, by Megatron-LM's naming."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if sizes["pp"] > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if sizes["ep"] > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return root / "iter_0000005" / name / "model_optim_rng.pt"


def args_of(config: FlatConfig, sizes: dict[str, int]) -> argparse.Namespace:
    """The arguments by which such a model would have been trained."""
    moe = "num_moe_experts" in config
    return argparse.Namespace(
        **{key: value for key, value in config.items() if not key.startswith("model.") and key != "num_moe_experts"},
        num_experts=config.get("num_moe_experts"),
        group_query_attention=True,
        swiglu=True,
        untie_embeddings_and_output_weights=not config["model.share_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_base=config["model.rotary_base"],
        max_position_embeddings=512,
        vocab_size=256,
        padded_vocab_size=256,
        make_vocab_size_divisible_by=1,
        moe_layer_freq=1,
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=sizes["pp"],
        expert_model_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=sizes["etp"],
        use_distributed_optimizer=moe,
    )


def build(config: FlatConfig, sizes: dict[str, int]) -> list[nn.Module]:
    """This rank's model, in as many chunks as its pipeline rank holds."""
    chunks = depth_of(config)
    if chunks == 1:
        return [build_model(config, Spread(**sizes, dtype="bf16"))]
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks)
    return [build_model(config, Spread(**sizes, dtype="bf16"), vp_stage=stage) for stage in range(chunks)]


def depth_of(config: FlatConfig) -> int:
    return int(str(config.get("virtual_pipeline_model_parallel_size", 1)))


def named(models: list[nn.Module]) -> dict[str, nn.Module]:
    """Models by their entry of Megatron-LM's state."""
    return {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}


def sharded(models: list[nn.Module], apart: bool = False) -> dict[str, object]:
    """What Megatron Core stores of every chunk, and asks for."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": apart, "chained_optim_avoid_prefix": True, "dp_cp_group": group}
    return {name: model.sharded_state_dict(metadata=metadata) for name, model in named(models).items()}


def tensors_of(models: list[nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{chunk}.{name}": value.clone()
        for chunk, model in named(models).items()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def save(name: str, config: FlatConfig, sizes: dict[str, int], work: Path) -> None:
    torch.manual_seed(3)
    models = build(config, sizes)
    if len(models) == 1:
        save_torch_dist(models[0], work / name / "dist" / "iter_0000005")
    else:
        folder = work / name / "dist" / "iter_0000005"
        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        content = {"checkpoint_version": 3.0, "iteration": 5, "content_metadata": {"singleton_local_shards": False}}
        dist_checkpointing.save({**content, **sharded(models)}, str(folder), ("torch_dist", 1))
    if parallel_state.get_expert_data_parallel_rank() == 0:
        path = legacy_name(work / name / "legacy", sizes)
        path.parent.mkdir(parents=True)
        states = {entry: model.state_dict() for entry, model in named(models).items()}
        args = args_of(config, sizes)
        torch.save(
            {"args": args, "checkpoint_version": 3.0, "iteration": 5, **states, "optimizer": {"state": torch.ones(3)}},
            path,
        )
    if name == "moe":  # layers, experts and halves apart: what Megatron Core offers for checkpoints kept in memory
        folder = work / name / "apart" / "iter_0000005"
        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        content = {"checkpoint_version": 3.0, "iteration": 5, "args": args_of(config, sizes)}
        dist_checkpointing.save({**content, **sharded(models, apart=True)}, str(folder), ("torch_dist", 1))
    torch.save(tensors_of(models), work / f"{name}.{torch.distributed.get_rank()}.pt")
    if torch.distributed.get_rank() == 0:
        for kind in ("dist", "legacy"):
            (work / name / kind / "latest_checkpointed_iteration.txt").write_text("5")


def load(name: str, config: FlatConfig, sizes: dict[str, int], work: Path) -> dict[str, list[str]]:
    """Names of tensors that differ after loading each of mbx's outputs; `fresh` is what differs before."""
    wanted = torch.load(work / f"{name}.{torch.distributed.get_rank()}.pt", weights_only=True)

    def unequal(models: list[nn.Module]) -> list[str]:
        have = tensors_of(models)
        assert have.keys() == wanted.keys()
        return [key for key, value in wanted.items() if not torch.equal(value, have[key])]

    torch.manual_seed(4)
    found = {"fresh": unequal(build(config, sizes))}
    for made in sorted((work / name).glob("to_dist*")):
        models = build(config, sizes)
        if len(models) == 1:
            load_torch_dist(models[0], made / "iter_0000005")
        else:
            loaded = dist_checkpointing.load(sharded(models), str(made / "iter_0000005"))
            for entry, model in named(models).items():
                model.load_state_dict(loaded[entry], strict=True)
        found[made.name] = unequal(models)
    for made in sorted((work / name).glob("to_legacy*")):
        models = build(config, sizes)
        state = torch.load(legacy_name(made, sizes), weights_only=False)
        for entry, model in named(models).items():
            model.load_state_dict(state[entry], strict=True)
        found[made.name] = unequal(models)
    return found


def main(job: str, rank: int, world_size: int, work: Path) -> None:
    torch.set_num_threads(1)
    # Megatron Core moves a tied embedding to the GPU before it shares it between pipeline stages.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    found = {}
    for name, (config, sizes) in MODELS.items():
        meeting = work / f"{job}.{name}.store"
        with megatron_on_cpu(), process_group(Spread(**sizes), rank=rank, world_size=world_size, init_file=meeting):
            if job == "save":
                save(name, config, sizes, work)
            else:
                found[name] = load(name, config, sizes, work)
            torch.distributed.barrier()
    if job == "load":
        torch.save(found, work / f"load.{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[3], int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]))
