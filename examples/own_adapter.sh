#!/usr/bin/env bash
# Adapters of a method of your own, (IA)3 (arXiv 2205.05638): trained on Megatron Core, exported, and read by PEFT.
set -euo pipefail
qwen2="$(cd "$(dirname "$0")/.." && pwd)/fixtures/tiny/qwen2"

cat > ia3.py <<'END'
import torch

from mbx.train.lora.method import Tuned


class IA3(Tuned):
    """A factor for each output of keys and values, and for each input of the MLP's second product."""

    method, names = "ia3", ("l",)

    def __init__(self, site):
        super().__init__(site)
        self.scales_input = self.leaf == "linear_fc2"
        if self.scales_input:
            self.add_columns("l", 1.0)
        else:
            self.add_rows("l", 1.0)

    def adapted(self, x, arguments):
        if self.scales_input:
            y, bias, _ = self.run_base(x * self.lora_l, arguments)
            return y, bias
        y, bias, _ = self.run_base(x, arguments)
        scale = self.over_rows("l", torch.ones_like(self.weight[:, 0]))  # queries keep theirs
        return y * scale, bias if bias is None else bias * scale

    @classmethod
    def export(cls, trained, lora):
        modules = {one.module.rpartition(".")[2] for one in trained}
        config = {
            "peft_type": "IA3",
            "target_modules": sorted(modules),
            "feedforward_modules": sorted(modules & {"down_proj", "fc2"}),
        }
        tensors = {}
        for one in trained:
            inputs = one.module.rpartition(".")[2] in config["feedforward_modules"]
            value = one.values["l"]
            tensors[f"base_model.model.{one.module}.ia3_l"] = value[None] if inputs else value[:, None]
        return config, tensors
END
mbx train llama32_1b_lora "model=$qwen2" data.kind=pattern data.length=64 train.global_batch=4 steps=6 lr=3e-2 \
  lora.method=ia3 lora.rank=1 lora.targets=k_proj,v_proj,down_proj run.dir=run --hooks ia3.py
mbx train export run adapter --hooks ia3.py
python - "$qwen2" <<'END'
import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "adapter")
for name, factors in model.named_parameters():
    if "layers.0" in name and "ia3" in name:
        print(name, [round(value, 3) for value in factors.flatten()[:4].tolist()])
END
