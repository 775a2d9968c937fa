"""A whole checkpoint rewritten as its twin of `transformers.equivalents`, for code that loads a folder at once."""

from __future__ import annotations

import json
from pathlib import Path

from mbx.models.transformers.equivalents import Twin


def write_twin(source: Path, out: Path, twin: Twin) -> str:
    """Write the twin of the checkpoint `source` into `out`; returns what to call the comparison."""
    from safetensors.torch import load_file, save_file

    twin.register()
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    named = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = {ours: tensor for name, tensor in named.items() if (ours := twin.name_of(name)) is not None}
    for number in range(raw.get("text_config", raw)["num_hidden_layers"]):
        at = f"model.layers.{number}."
        layer = {name: weights.pop(name) for name in [*weights] if name.startswith(at)}
        weights |= twin.layer_of(raw, number, layer)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(twin.config_of(raw), indent=1), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return twin.note
