"""Adapters as PEFT and engines would read them, by the names and shapes of their factors."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def factors_of(
    name: str, factors: dict[str, torch.Tensor], *, experts: int, rank: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A and B of a weight, from PEFT's names: of all experts of a layer in two adapters, gate and up below the other.

    A: [experts · r, in]; B: [out, r · experts], the expert fastest.
    """
    stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    if f"{stem}A.weight" in factors or ".experts." not in name:
        return factors.get(f"{stem}A.weight"), factors.get(f"{stem}B.weight")
    layer, _, rest = name.partition(".experts.")
    expert, part, _ = rest.split(".")
    stem = f"base_model.model.{layer}.experts.{'' if part == 'down_proj' else 'base_layer.'}lora_"
    a = factors[f"{stem}A.weight"].view(experts, rank, -1)[int(expert)]
    b = factors[f"{stem}B.weight"].view(-1, rank, experts)[:, :, int(expert)]
    return a, b if part == "down_proj" else b.chunk(2)[part == "up_proj"]


def by_sglang(
    factors: dict[str, torch.Tensor], folder: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]
) -> list[str]:
    """Names that SGLang would not read, and tensors that it would change otherwise.

    A factor of an expert is a matrix with the expert's number in its name (`lora/mem_pool.py`); gate's and up's are
    stacked by their names (`lora/lora.py`, `normalize_gate_up_proj`).
    """
    odd = [n for n, t in factors.items() if t.dim() != 2 or (".experts." in n and not re.search(r"experts\.\d+\.", n))]
    for name, tensor in folder.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = factors.get(f"{stem}A.weight"), factors.get(f"{stem}B.weight")
        total = tensor.float() if a is None or b is None else tensor.float() + (b.float() @ a.float()) * 2.0
        if not torch.allclose(merged[name], total, rtol=1e-6, atol=1e-6):
            odd.append(name)
    return odd


def by_peft(work: Path, family: str, factors: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that PEFT merges otherwise."""
    import json

    import peft
    import transformers
    from safetensors.torch import save_file

    into = work / f"{family}.adapter"
    into.mkdir()
    save_file(factors, into / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-3] for name in factors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8.0, "target_modules": modules}
    (into / "adapter_config.json").write_text(json.dumps(config))
    base = transformers.AutoModelForCausalLM.from_pretrained(work / family, dtype=torch.float32)
    own = peft.PeftModel.from_pretrained(base, str(into)).merge_and_unload().state_dict()
    return [name for name, tensor in merged.items() if not torch.equal(own[name], tensor)]
