"""Checkpoints to measure with: the headers of real models, and random or no bytes, made without torch."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.tensors import StoredTensor, nbytes_of
from fixtures.index import Header, load_index
from mbx.io.safetensors import build_header

#: Name → model whose shapes are used, and the layers kept (None: all).
SIZES: dict[str, tuple[str, int | None]] = {
    "1b": ("Llama-3.2-1B", None),
    "8b": ("Llama-3.1-8B", None),
    "70b": ("Llama-3.3-70B-Instruct", None),
    "70b-cut": ("Llama-3.3-70B-Instruct", 8),
    "deepseek-v3": ("DeepSeek-V3", None),
}
_SHARD_BYTES = 5 * 10**9
_BLOCK = 1 << 24


def make(folder: Path, size: str, *, sparse: bool = False) -> int:
    """Write the checkpoint `size` into `folder`; returns its bytes. `sparse` files hold zeros and take no space."""
    model, layers = SIZES[size]
    config, headers = load_index(model)
    if layers is not None:
        config, headers = _cut(config, headers, layers)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = list(_shards(headers))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = build_header(shard, {"format": "pt"})
        nbytes = sum(tensor.nbytes for tensor in shard)
        _write(folder / name, header, nbytes, sparse=sparse)
        weight_map |= {tensor.name: name for tensor in shard}
        total += len(header) + nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _cut(config: dict[str, Any], headers: dict[str, Header], layers: int) -> tuple[dict[str, Any], dict[str, Header]]:
    def kept(name: str) -> bool:
        parts = name.split(".")
        return "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers

    return {**config, "num_hidden_layers": layers}, {name: h for name, h in headers.items() if kept(name)}


def _shards(headers: dict[str, Header]) -> Iterable[list[StoredTensor]]:
    shard: list[StoredTensor] = []
    room = _SHARD_BYTES
    for name, (dtype, shape) in headers.items():
        nbytes = nbytes_of(dtype, shape)
        if shard and nbytes > room:
            yield shard
            shard, room = [], _SHARD_BYTES
        shard.append(StoredTensor(name, dtype, shape, ()))
        room -= nbytes
    yield shard


def _write(path: Path, header: bytes, nbytes: int, *, sparse: bool) -> None:
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            os.truncate(path, len(header) + nbytes)
            return
        # A block of noise, rotated by an odd step: no two places of the file hold the same megabyte.
        noise = random.Random(0).randbytes(_BLOCK) * 2
        for at in range(0, nbytes, _BLOCK):
            start = at // _BLOCK * 65537 % _BLOCK
            file.write(memoryview(noise)[start : start + min(_BLOCK, nbytes - at)])
