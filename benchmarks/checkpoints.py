"""Checkpoints to measure with: the headers of real models, and random or no bytes, made without torch."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.tensors import StoredTensor, nbytes_of
from fixtures.index import Header, load_index
from mbx.formats.safetensors import build_header


@dataclass(frozen=True, slots=True)
class Size:
    """A model whose shapes are used, and what is kept of it (None: all)."""

    model: str
    layers: int | None = None
    experts: int | None = None


SIZES = {
    "tiny": Size("Qwen2.5-0.5B", 1),
    "tiny-fp8": Size("DeepSeek-V3", 1, 8),
    "tiny-mxfp4": Size("gpt-oss-20b", 1),
    "1gb": Size("Llama-3.2-1B", 4),
    "1b": Size("Llama-3.2-1B"),
    "4gb": Size("Llama-3.1-8B", 4),
    "8b": Size("Llama-3.1-8B"),
    "40gb": Size("Llama-3.3-70B-Instruct", 21),
    "70b": Size("Llama-3.3-70B-Instruct"),
    "70b-cut": Size("Llama-3.3-70B-Instruct", 8),
    "fp8": Size("DeepSeek-V3", 4, 128),
    "mxfp4": Size("gpt-oss-20b", 6),
    "deepseek-v3": Size("DeepSeek-V3"),
}
_SHARD_BYTES = 5 * 10**9
_BLOCK = 1 << 24


def make(folder: Path, size: str, *, sparse: bool = False, weights: bool = False) -> int:
    """Write the checkpoint `size` into `folder`; returns its bytes. `sparse` files hold zeros and take no space;
    `weights` are bf16 from a normal distribution, where else any bits may stand.

    Scales are ones either way, but for those of a full-size plan, which nobody reads.
    """
    chosen = SIZES[size]
    config, headers = load_index(chosen.model)
    if chosen.layers is not None:
        config, headers = _cut(config, headers, chosen)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = list(_shards(headers))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = build_header(shard, {"format": "pt"})
        nbytes = sum(tensor.nbytes for tensor in shard)
        _write(folder / name, header, nbytes, None if sparse else _weights() if weights else _noise())
        if chosen.layers is not None:
            _write_scales(folder / name, len(header), shard)
        weight_map |= {tensor.name: name for tensor in shard}
        total += len(header) + nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _cut(config: dict[str, Any], headers: dict[str, Header], size: Size) -> tuple[dict[str, Any], dict[str, Header]]:
    """The first layers, without predicted tokens, and of their experts the first."""
    layers, experts = size.layers or 0, size.experts
    all_experts = config.get("n_routed_experts")
    kept: dict[str, Header] = {}
    for name, (dtype, shape) in headers.items():
        parts = name.split(".")
        if "layers" in parts and int(parts[parts.index("layers") + 1]) >= layers:
            continue
        if experts is not None and "experts" in parts and int(parts[parts.index("experts") + 1]) >= experts:
            continue
        routed = experts is not None and ".mlp.gate." in name and shape[0] == all_experts
        kept[name] = (dtype, (experts, *shape[1:])) if routed and experts else (dtype, shape)
    changed: dict[str, Any] = {"num_hidden_layers": layers}
    changed |= {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in config else {}
    changed |= {"layer_types": config["layer_types"][:layers]} if config.get("layer_types") else {}
    changed |= {"n_routed_experts": experts} if experts is not None else {}
    return {**config, **changed}, kept


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


def _noise() -> bytes:
    return random.Random(0).randbytes(_BLOCK)


def _weights() -> bytes:
    values = np.random.default_rng(0).standard_normal(_BLOCK // 2, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _write(path: Path, header: bytes, nbytes: int, block: bytes | None) -> None:
    with path.open("wb") as file:
        file.write(header)
        if block is None:
            os.truncate(path, len(header) + nbytes)
            return
        # The block again and again, rotated by a step of whole values: no two places hold the same megabyte.
        twice = memoryview(block * 2)
        for at in range(0, nbytes, _BLOCK):
            start = at // _BLOCK * 65538 % _BLOCK
            file.write(twice[start : start + min(_BLOCK, nbytes - at)])


def _write_scales(path: Path, at: int, shard: Iterable[StoredTensor]) -> None:
    """Overwrite the scales of quantised tensors by ones."""
    with path.open("r+b") as file:
        for tensor in shard:
            if tensor.name.endswith(("_scale_inv", "_scales")):
                one = b"\x7f" if tensor.dtype == "U8" else struct.pack("<f", 1.0)
                file.seek(at)
                file.write(one * (tensor.nbytes // len(one)))
            at += tensor.nbytes
