"""Checkpoints of both kinds as dicts of tensors: read, changed, and written by the libraries' own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from converters.torch_casts import TORCH_DTYPES
from mbx.formats.files import FileSource
from mbx.formats.registry import open_megatron as open_any

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def read_mcore(path: Path) -> Tensors:
    """Every weight of a Megatron checkpoint under its canonical key."""
    opened = open_any(path)
    source, out = FileSource(opened.iteration), {}
    for name, tensor in opened.tensors.items():
        whole = out[name] = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
        for chunk in tensor.chunks:
            part = torch.empty(chunk.sizes, dtype=whole.dtype)
            raw = part.view(-1).view(torch.uint8).numpy()
            source.read_into(chunk.file, source.data_start(chunk), raw.data)
            box = [slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            whole[tuple(box)] = part
    source.close()
    return out


def write_mcore(tensors: Mapping[str, torch.Tensor], path: Path, hf: Path | None = None) -> Path:
    """A torch_dist checkpoint in which Torch itself wrote each tensor as one chunk; `hf` are side files to carry."""
    iteration = path / "iter_0000000"
    iteration.mkdir(parents=True)
    writer = dcp.FileSystemWriter(iteration)
    dcp.save({name: tensor.contiguous() for name, tensor in tensors.items()}, storage_writer=writer, no_dist=True)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(backends))
    (path / "latest_checkpointed_iteration.txt").write_text("0")
    if hf is not None:
        shutil.copytree(hf, iteration / "hf")
    return path


def changed_mcore(source: Path, target: Path, change: Change) -> Path:
    """A copy of a checkpoint with its tensors changed and its side files kept."""
    tensors = read_mcore(source)
    change(tensors)
    return write_mcore(tensors, target, open_any(source).hf)


def read_hf(path: Path) -> Tensors:
    """Every tensor of a Hugging Face folder."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed_hf(
    source: Path, target: Path, change: Change | None = None, config: Mapping[str, Any] | None = None, files: int = 1
) -> Path:
    """A copy of a folder with its tensors and config changed, in `files` safetensors files."""
    tensors = read_hf(source)
    if change is not None:
        change(tensors)
    names = shutil.ignore_patterns("*.safetensors", "*.index.json", "mbx_manifest.json")
    shutil.copytree(source, target, ignore=names)
    for number in range(files):
        part = {name: t.contiguous() for place, (name, t) in enumerate(tensors.items()) if place % files == number}
        name = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, target / name, metadata={"format": "pt"})
    if files > 1:
        weights = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    if config is not None:
        stored = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**stored, **config}))
    return target


def per_layer(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Stacked decoder layers under a key of their own each."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers.") and not name.split(".")[2].isdigit():
            rest = name.removeprefix("decoder.layers.")
            out |= {f"decoder.layers.{i}.{rest}": tensor[i] for i in range(tensor.shape[0])}
        else:
            out[name] = tensor
    return out
