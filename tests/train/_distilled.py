"""Rows that a teacher drew, and a student of half its layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from _trainings import ROOT

LLAMA = ROOT / "fixtures" / "tiny" / "llama"


def drawn_rows(folder: Path, *, train: int, held: int) -> tuple[Path, Path, str]:
    """A teacher with a sharp mind, a student of its first two layers, and documents of 32 tokens that it drew."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    weights = {key: value for file in sorted(LLAMA.glob("*.safetensors")) for key, value in load_file(file).items()}
    weights["lm_head.weight"] = 4 * weights["lm_head.weight"]
    halves = {key: value for key, value in weights.items() if ".layers.2." not in key and ".layers.3." not in key}
    config = json.loads((LLAMA / "config.json").read_text())
    for name, held_weights, layers in (("teacher", weights, 4), ("student", halves, 2)):
        (folder / name).mkdir()
        save_file(held_weights, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    torch.manual_seed(0)
    drawn = torch.randint(0, 251, (train + held, 1))
    with torch.no_grad():
        while drawn.shape[1] < 32:
            drawn = torch.cat((drawn, torch.multinomial(model(drawn).logits[:, -1].softmax(-1), 1)), 1)
    builder = IndexedDatasetBuilder(str(folder / "rows.bin"), dtype=np.int32)
    for row in drawn.numpy().astype(np.int32):
        builder.add_document(row, [len(row)])
    builder.finalize(str(folder / "rows.idx"))
    return folder / "teacher", folder / "student", str(folder / "rows")
