"""Quantised Hugging Face folders, made from plain tiny ones by the rules of those who publish them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from converters.codecs import Codec, Fp8Block, Fp8Scaled, Int4Packed
from fixtures.make_tiny import make

Parts = dict[str, torch.Tensor]
#: Stored parts by what follows the module's name, and what they stand for.
Stored = tuple[Parts, torch.Tensor]

INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
}


def _scaled(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


#: Name → (tiny checkpoint, codec of its matrices, quantization_config); None: the checkpoint is quantised already.
FOLDERS: dict[str, tuple[str, Codec | None, dict[str, Any] | None]] = {
    "fp8_block": ("deepseek_v3_fp8", None, None),
    "fp8_block_ue8m0": (
        "qwen3",
        Fp8Block(block=(16, 32), scale_rule="ue8m0"),
        {"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": "ue8m0"},
    ),
    "fp8_tensor": (
        "llama",
        Fp8Scaled(strategy="tensor", scale_suffix="_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "fp8_channel": ("qwen3", Fp8Scaled(scale_dtype="BF16"), _scaled("channel")),
    "mxfp4": ("gpt_oss_mxfp4", None, None),
    "int4_packed": ("kimi_k2", Int4Packed(), INT4),
}

#: Parts of the names of matrices that stay plain.
_PLAIN = ("embed", "lm_head", "shared_head", "eh_proj", ".gate.weight")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def quantised(name: str, out: Path) -> Path:
    """The folder `name` of FOLDERS in `out`; scales come from fp32 values that bf16 does not hold."""
    base, codec, quantization = FOLDERS[name]
    make(base, out)
    if codec is None or quantization is None:
        return out
    stored: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(out / "model.safetensors").items():
        if tensor.dim() != 2 or tensor.shape[1] % 32 or any(word in key for word in _PLAIN):
            stored[key] = tensor
        else:
            parts = codec.encode(tensor.float() * 1.0123)
            stored |= {part: parts[role] for role, part in codec.part_names(key).items()}
            if quantization.get("activation_scheme") == "static":
                stored[key.removesuffix("weight") + "input_scale"] = torch.tensor(0.75)
    save_file(dict(sorted(stored.items())), out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))
    return out


def change(folder: Path, edit: Any) -> None:
    """Rewrite the one weight file of a folder after `edit` changed its tensors in place."""
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def stored_as(
    store: Callable[[torch.Tensor], Stored],
    quantization: dict[str, object],
    folder: Path,
    *,
    apart: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Parts:
    """The tiny Llama of `dtype` with every linear stored by `store`; what its tensors stand for.

    `quantization` stands in config.json, or `apart`, in ModelOpt's own file.
    """
    make("llama", folder)
    torch.manual_seed(3)
    stored: Parts = {}
    values = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" not in key:
            stored[key] = values[key] = tensor.to(dtype)
            continue
        parts, values[key] = store(tensor.to(dtype))
        stem = key.removesuffix("weight")
        stored |= {stem + part: value for part, value in parts.items()}
    save_file(dict(sorted(stored.items())), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if apart:
        said = {"producer": {"name": "modelopt"}, "quantization": quantization}
        (folder / "hf_quant_config.json").write_text(json.dumps(said, indent=2))
    else:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return values


def compressed(storage: str, bits: int, kind: str, **weights: object) -> dict[str, object]:
    said = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "actorder": "static" if kind == "int" else None,
        **weights,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": said}}
    return {"quant_method": "compressed-tensors", "format": storage, "config_groups": groups}
