"""Folders with other tensors than a tiny family has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from _models import read_folder
from safetensors.torch import save_file

from converters.codecs import Fp8Block
from fixtures.make_tiny import make


def rewritten(folder: Path, into: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with other tensors."""
    shutil.copytree(folder, into)
    for path in into.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, into / "model.safetensors")
    return into


def stacked_fp8(into: Path) -> Path:
    """A folder whose experts are a stack in FP8 by blocks of 16, [8, n, m]; the rest is plain."""
    plain, codec = make("qwen3_moe", into.with_name(f"{into.name}.plain"), layout="v5"), Fp8Block(block=(16, 16))
    tensors = read_folder(plain)
    for name in [name for name in tensors if ".experts." in name]:
        parts = codec.encode(tensors.pop(name))
        tensors |= {part: parts[role] for role, part in codec.part_names(name).items()}
    rewritten(plain, into, tensors)
    config = json.loads((into / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (into / "config.json").write_text(json.dumps(config))
    return into
