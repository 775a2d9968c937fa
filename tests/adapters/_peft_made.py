"""Adapters that PEFT itself makes on tiny models, with random factors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from fixtures.make_tiny import make

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: What is adapted in each tiny model, as `LoraConfig` takes it.
CASES: dict[str, dict[str, object]] = {
    "llama": {"target_modules": "all-linear"},
    "qwen3": {"target_modules": ["q_proj", "v_proj", "gate_proj"], "use_rslora": True},
    "gemma2": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "use_dora": True},
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"]},
    "qwen3_moe": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "mixtral": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "gpt_oss": {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
    "qwen3_next": {"target_modules": [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "linear_attn.out_proj"]},
    "qwen3_5_text": {
        "target_modules": ["q_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "down_proj"],
        "use_dora": True,
    },
    "deepseek_v2": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
}


@dataclass(frozen=True)
class Made:
    """A base folder, an adapter folder on it, and the adapted model."""

    base: Path
    adapter: Path
    model: peft.PeftModel


def adapt(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, **config: object) -> Made:
    """The tiny model `name` stored in `dtype`, and an adapter on it; without `config` the one of CASES."""
    base = make(name, folder / "base")
    for file in base.glob("*.safetensors"):
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **(config or CASES[name])})  # type: ignore[arg-type]
    adapted = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:  # what is trained whole, rows of it, and biases
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "peft")
    return Made(base, folder / "peft", adapted.eval())


def same_files(left: Path, right: Path) -> bool:
    """Whether every file of `left` lies in `right` with the same bytes."""
    return all(path.read_bytes() == (right / path.name).read_bytes() for path in left.iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
