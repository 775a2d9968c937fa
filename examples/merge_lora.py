"""A LoRA as PEFT writes it: to a Megatron checkpoint of adapters and back, then merged into its base."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import mbx

LLAMA = Path(__file__).resolve().parents[1] / "fixtures" / "tiny" / "llama"
sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(LLAMA)
lora = get_peft_model(
    model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
)
lora.save_pretrained("lora")

replace = mbx.Options(overwrite=True)
mbx.convert("lora", "lora-mcore", mbx.Options(layout=mbx.Layout(tp=2), overwrite=True), base=LLAMA)
mbx.convert("lora-mcore", "lora-back", replace, base=LLAMA)
assert Path("lora/adapter_model.safetensors").read_bytes() == Path("lora-back/adapter_model.safetensors").read_bytes()
print("the adapter came back byte for byte")

mbx.merge(LLAMA, "lora", "merged", replace)
changes = mbx.diff(LLAMA, "merged")
print(f"{len(changes.changes)} weights changed, {changes.unchanged} did not")
for change in changes.changes[:3]:
    print(f"  {change.name}: |Δ| / |W| = {change.relative:.3f}")
assert {change.name.split(".")[-2] for change in changes.changes} == {"q_proj", "v_proj"}
