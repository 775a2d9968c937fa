"""Adapters as Hugging Face PEFT folders: `adapter_config.json` and `adapter_model.safetensors`.

Names follow PEFT's `get_peft_model_state_dict`: `base_model.model.MODULE.lora_A.weight` [r, in], `lora_B.weight`
[out, r], and for DoRA `lora_magnitude_vector` [out].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from converters.config_map import environment
from converters.errors import StorageError, UnsupportedError, UsageError
from converters.table import Table
from converters.tensors import StoredTensor
from mbx.io import hf, torch_dist
from mbx.io.files import FileSource
from mbx.registry import table_for
from mbx.train.checkpoint import RECIPE, latest, read_state
from mbx.train.lora import adapters
from mbx.train.model import Blueprint

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_OPS = ("qkv", "glu", "col", "row", "copy")
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def projections(table: Table, config: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Hugging Face modules of each Megatron Core linear, atom by atom, from the table's rows.

    UnsupportedError where Transformers fuses atoms that are adapted apart here.
    """
    found = {}
    for row in table.expand(environment(config), None):  # type: ignore[arg-type]
        module, _, leaf = row.mcore.rpartition(".")
        if leaf != "weight" or row.expert is not None or ".linear_" not in f".{module}":
            continue
        if row.spec.op not in _OPS:
            raise UnsupportedError(
                f"`{row.mcore}` is one fused tensor in Transformers (op {row.spec.op}): no PEFT adapter fits"
            )
        found[module] = tuple(name.removesuffix(".weight") for name in row.hf)
    return found


def export_peft(run_dir: Path, target: Path) -> Path:
    """Write the adapters of a run's last checkpoint as a PEFT folder at `target`; no model is built."""
    from safetensors.torch import save_file

    recipe, table, config, tensors = _read_run(run_dir)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"`{target}` is not empty", hint="name a new folder")
    lora = recipe["lora"]
    assert isinstance(lora, dict)
    out: dict[str, torch.Tensor] = {}
    for module, names in projections(table, config).items():
        if module.rpartition(".")[2] not in lora["targets"]:
            continue
        a = tensors[f"{module}.lora_a"]
        for atom, (name, part) in enumerate(zip(names, a.chunk(len(names)), strict=True)):
            out[f"{_PREFIX}{name}.lora_A.weight"] = part.contiguous()
            out[f"{_PREFIX}{name}.lora_B.weight"] = tensors[f"{module}.lora_b{atom}"]
            if lora["dora"]:
                out[f"{_PREFIX}{name}.lora_magnitude_vector"] = tensors[f"{module}.lora_m{atom}"]
    target.mkdir(parents=True, exist_ok=True)
    save_file(out, target / WEIGHTS, metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe["base"],
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "use_dora": lora["dora"],
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in _modules(out)}),
    }
    (target / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return target


def _modules(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    return (key.removeprefix(_PREFIX).split(".lora_")[0] for key in tensors)


def _read_run(run_dir: Path) -> tuple[dict[str, object], Table, dict[str, object], dict[str, torch.Tensor]]:
    """Recipe, table, config and adapter tensors (one entry a layer) of a run's last checkpoint."""
    found = latest(run_dir)
    if found is None:
        raise StorageError(f"`{run_dir}` holds no checkpoint")
    recipe = json.loads((found / RECIPE).read_text(encoding="utf-8"))
    if not recipe["lora"]["rank"]:
        raise UsageError(f"`{run_dir}` trained every weight; it has no adapter", hint="mbx convert mcore-to-hf")
    recipe["base"] = read_state(found).base
    raw = hf.read_config(found / "hf")
    table = table_for(raw, recipe["model"]["mapping"] or None)
    opened = torch_dist.open_torch_dist(found)
    source = FileSource(opened.iteration)
    tensors = {}
    try:
        for key, stored in opened.dcp.tensors.items():
            if key.startswith("optimizer") or not key.rpartition(".")[2].startswith("lora_"):
                continue
            whole = _read(source, stored)
            if key.startswith("decoder.layers.self_attention") or key.startswith("decoder.layers.mlp"):
                for layer, part in enumerate(whole):  # stacked: the layer is the first dimension
                    tensors[key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)] = part.contiguous()
            else:
                tensors[key] = whole
    finally:
        source.close()
    return recipe, table, dict(table.config.to_mcore(raw)), tensors


def _read(source: FileSource, stored: StoredTensor) -> torch.Tensor:
    dtype = _TORCH[stored.dtype]
    whole = torch.empty(stored.shape, dtype=dtype)
    for chunk in stored.chunks:
        part = torch.empty(chunk.sizes, dtype=dtype)
        buffer = part.reshape(-1).view(torch.uint8).numpy().data
        source.read_into(chunk.file, source.data_start(chunk), buffer)
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = part
    return whole


def load_peft(model: nn.Module, plan: Blueprint, folder: Path) -> None:
    """Fill the adapters of a bare model from a PEFT folder, each rank its own part."""
    from megatron.core import parallel_state
    from safetensors import safe_open

    described = _config(folder)
    if plan.table is None:
        raise UsageError("a PEFT adapter is read by the names of a Hugging Face model", hint="model=DIR")
    names_of = projections(plan.table, dict(plan.config))
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()

    def mine(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        return tensor if dim is None or tp == 1 else tensor.chunk(tp, dim)[rank]

    with safe_open(folder / WEIGHTS, framework="pt") as file, torch.no_grad():
        present, used = set(file.keys()), set()
        for module, adapter in adapters(model):
            if (described["r"], bool(described.get("use_dora"))) != (adapter.rank, adapter.dora):
                raise UsageError(
                    f"`{folder}` has r={described['r']}, use_dora={described.get('use_dora')}; the recipe asks for "
                    f"lora.rank={adapter.rank}, lora.dora={str(adapter.dora).lower()}"
                )
            scale = float(described["lora_alpha"]) / int(described["r"])  # type: ignore[arg-type,call-overload]
            if scale != adapter.scale:
                raise UsageError(
                    f"`{folder}` scales by {scale:g}, the recipe by lora.alpha/lora.rank = {adapter.scale:g}"
                )
            for atom, name in enumerate(names_of[module]):
                keys = [f"{_PREFIX}{name}.lora_{x}.weight" for x in "AB"]
                if missing := [key for key in keys if key not in present]:
                    raise UsageError(f"`{folder}` has no `{missing[0]}`", hint="name its modules in lora.targets")
                used.update(keys)
                a, b = (file.get_tensor(key) for key in keys)
                place = slice(atom * adapter.rank, (atom + 1) * adapter.rank)
                adapter.lora_a[place].copy_(mine(a, 1 if adapter.row_parallel else None))
                adapter.b(atom).copy_(mine(b, None if adapter.row_parallel else 0))
                if adapter.dora:
                    key = f"{_PREFIX}{name}.lora_magnitude_vector"
                    used.add(key)
                    m = mine(file.get_tensor(key), None if adapter.row_parallel else 0)
                    adapter.get_parameter(f"lora_m{atom}").copy_(m)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1 and (extra := sorted(present - used)):
        raise UsageError(f"`{folder}` adapts modules that lora.targets does not: {extra[0]}", details=extra)


def _config(folder: Path) -> dict[str, object]:
    try:
        loaded = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"`{folder}` is no PEFT folder: {error}") from error
    if loaded.get("peft_type") != "LORA" or loaded.get("bias", "none") != "none" or loaded.get("rank_pattern"):
        raise UnsupportedError(f"`{folder}`: only plain LoRA and DoRA adapters of one rank are read")
    return dict(loaded)


def merge_peft(base: Path, adapter: Path, target: Path) -> Path:
    """Write the Hugging Face folder `base` with the PEFT adapter merged in fp32; one file is in memory at a time."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    described = _config(adapter)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"`{target}` is not empty", hint="name a new folder")
    parts = load_file(adapter / WEIGHTS)
    scale = float(described["lora_alpha"]) / int(described["r"])  # type: ignore[arg-type,call-overload]
    waiting = {name: name for name in _modules(parts)}
    folder = hf.open_hf(base)
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.weight_files:
        with safe_open(base / file, framework="pt") as stored:
            metadata, tensors = stored.metadata(), {key: stored.get_tensor(key) for key in list(stored.keys())}
        for key, weight in tensors.items():
            if waiting.pop(module := key.removesuffix(".weight"), None) is None:
                continue
            a, b = (parts[f"{_PREFIX}{module}.lora_{x}.weight"].float() for x in "AB")
            total = weight.float() + scale * (b @ a)
            if described.get("use_dora"):
                m = parts[f"{_PREFIX}{module}.lora_magnitude_vector"].float()
                total *= (m / total.norm(dim=1))[:, None]
            tensors[key] = total.to(weight.dtype)
        save_file(tensors, target / file, metadata=metadata)
    if waiting:
        raise StorageError(
            f"`{base}` lacks {len(waiting)} adapted weight(s): {sorted(waiting)[0]}", details=sorted(waiting)
        )
    for name in folder.side_files:
        shutil.copyfile(base / name, target / name)
    return target
