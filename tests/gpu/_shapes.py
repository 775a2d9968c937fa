"""Checkpoints in the shape of real models, with weights that a forward pass can run: small noise, norms of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from converters.tensors import StoredTensor, nbytes_of
from fixtures.index import load_index
from mbx.formats.safetensors import build_header

_SHARD_BYTES = 5 * 10**9
_NOISE = 1 << 24
_STD = 0.02


def make(folder: Path, model: str, layers: int | None = None) -> int:
    """Write `model`, of a name in fixtures/index, cut to `layers`, in bf16; returns its bytes."""
    config, headers = load_index(model)
    if config.get("tie_word_embeddings"):  # a second copy would have to be the first one's values
        headers = {name: header for name, header in headers.items() if name != "lm_head.weight"}
    if layers is not None:
        config = {**config, "num_hidden_layers": layers}
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:layers]
    kept = [StoredTensor(name, "BF16", shape, ()) for name, (_, shape) in headers.items() if _below(name, layers)]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    noise = (torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)) * _STD).bfloat16()
    shards, weight_map, total = list(_shards(kept)), dict[str, str](), 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(build_header(shard, {"format": "pt"}))
            for tensor in shard:
                for block in _values(tensor, noise):
                    file.write(memoryview(block.view(torch.uint8).numpy()))
        weight_map |= {tensor.name: name for tensor in shard}
        total += sum(nbytes_of(tensor.dtype, tensor.shape) for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _below(name: str, layers: int | None) -> bool:
    parts = name.split(".")
    return layers is None or "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers


def _shards(tensors: list[StoredTensor]) -> Iterator[list[StoredTensor]]:
    shard: list[StoredTensor] = []
    for tensor in tensors:
        if shard and sum(one.nbytes for one in shard) + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _values(tensor: StoredTensor, noise: torch.Tensor) -> Iterator[torch.Tensor]:
    count = tensor.nbytes // 2
    if len(tensor.shape) < 2:
        yield torch.full((count,), float(tensor.name.endswith("norm.weight")), dtype=torch.bfloat16)
        return
    # Noise from another place for each tensor and block: no two rows of a matrix are alike.
    start = int.from_bytes(tensor.name.encode()[-8:], "little") % _NOISE
    while count:
        block = noise[start : start + count]
        yield block
        count -= len(block)
        start = (start * 31 + 7) % (_NOISE // 2)
