"""Megatron Core tensors under the keys of another checkpoint: layers stacked or apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from converters.mcore.keys import Key, parse_key
from converters.protocols import Source
from converters.tensors import Chunk, StoredTensor, nbytes_of


def respelt(tensors: Mapping[str, StoredTensor], wanted: Collection[str], source: Source) -> dict[str, StoredTensor]:
    """`tensors` (torch_dist keys) with layers stacked or apart as the keys `wanted` have them.

    What is there under a wanted key stays, and another spelling of it keeps its own key. Chunks are cut at layers
    where they must be, and then name their data's first byte themselves.
    """
    asked = set(wanted)
    want = asked - tensors.keys()
    out: dict[str, StoredTensor] = {}
    apart: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in tensors.items():
        key = parse_key(name)
        joined = _stem(name, key) + key.param
        if name in asked:
            out[name] = tensor
        elif key.site in ("decoder", "tower") and key.layer is not None and joined in want:
            apart.setdefault(joined, {})[key.layer] = tensor
        elif key.stacked and want.intersection(ones := _apart(name, key, tensor)) and not tensors.keys() & ones:
            for layer, one in enumerate(ones):
                out[one] = _layer(tensor, layer, one, source)
        else:
            out[name] = tensor
    for joined, layers in apart.items():
        first = layers[min(layers)]
        alike = all((t.shape, t.dtype) == (first.shape, first.dtype) for t in layers.values())
        if alike and sorted(layers) == list(range(len(layers))):
            out[joined] = _stack(joined, [layers[n] for n in range(len(layers))], source)
        else:
            out |= {tensor.name: tensor for tensor in layers.values()}
    return out


def _stem(name: str, key: Key) -> str:
    """What stands before a layer's number in a name, or before the parameter where the layers are stacked."""
    before = name.removesuffix(key.param)
    return before if key.layer is None else before.removesuffix(f"{key.layer}.")


def _apart(name: str, key: Key, tensor: StoredTensor) -> list[str]:
    """Keys of the layers that a stack holds, each under its own."""
    return [f"{_stem(name, key)}{layer}.{key.param}" for layer in range(tensor.shape[0])]


def _stack(name: str, layers: list[StoredTensor], source: Source) -> StoredTensor:
    chunks = tuple(
        Chunk((layer, *chunk.offsets), (1, *chunk.sizes), chunk.file, source.data_start(chunk))
        for layer, tensor in enumerate(layers)
        for chunk in tensor.chunks
    )
    return StoredTensor(name, layers[0].dtype, (len(layers), *layers[0].shape), chunks)


def _layer(tensor: StoredTensor, layer: int, name: str, source: Source) -> StoredTensor:
    chunks = []
    for chunk in tensor.chunks:
        at = layer - chunk.offsets[0]
        if 0 <= at < chunk.sizes[0]:
            start = source.data_start(chunk) + at * nbytes_of(tensor.dtype, chunk.sizes[1:])
            chunks.append(Chunk(chunk.offsets[1:], chunk.sizes[1:], chunk.file, start))
    return StoredTensor(name, tensor.dtype, tensor.shape[1:], tuple(chunks))
