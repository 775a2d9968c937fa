"""Whole tensors of checkpoints that store layers, experts, or the halves of a gated MLP under names of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from converters.errors import StorageError
from converters.mcore.fsdp_dtensor import Stored
from converters.mcore.keys import canonical_names, parse_key
from converters.mcore.torch_dist import layers_alike, stacks_layers
from converters.rows.expr import Value
from converters.tensors import Chunk, Shape, StoredTensor


def gather(
    stored: Mapping[str, StoredTensor], parse: Callable[[str], Stored], config: Mapping[str, Value]
) -> dict[str, StoredTensor]:
    """Tensors under torch_dist keys, put together of layers, experts and halves as `parse` tells them apart.

    Layers are stacked where Megatron Core would stack those of a model of `config`, as far as that is known.
    StorageError where one is missing, or unlike the others.
    """
    parsed = {name: parse(name) for name in stored if not name.endswith("_extra_state")}
    names = canonical_names({part.key for part in parsed.values()})
    single: dict[str, dict[int | None, dict[int | None, StoredTensor]]] = {}
    for name, part in parsed.items():
        single.setdefault(names[part.key], {}).setdefault(part.expert, {})[part.half] = stored[name]
    shapes = {key: next(iter(next(iter(experts.values())).values())).shape for key, experts in single.items()}
    stacked = stacks_layers(str(config.get("model.mcore_model", "gpt")), config) and layers_alike(shapes)
    entries: dict[str, dict[Shape, dict[int | None, StoredTensor]]] = {}
    for key, experts in single.items():
        parts = parse_key(key)
        lead: Shape = ()
        if stacked and parts.site == "decoder" and parts.layer is not None:
            key, lead = f"decoder.layers.{parts.param}", (parts.layer,)
        for expert, halves in experts.items():
            entries.setdefault(key, {})[lead if expert is None else (*lead, expert)] = halves
    return {key: _stack(key, found) for key, found in entries.items()}


def _stack(key: str, entries: Mapping[Shape, Mapping[int | None, StoredTensor]]) -> StoredTensor:
    """One tensor of all entries, whose chunks are theirs, moved to their place."""
    depth = len(next(iter(entries)))
    stack = tuple(1 + max(index[dim] for index in entries) for dim in range(depth))
    wanted = math.prod(stack)
    if len(entries) != wanted:
        raise StorageError(f"`{key}` has {len(entries)} of {wanted} layers and experts {list(stack)}")
    chunks: list[Chunk] = []
    kinds: set[tuple[str, Shape]] = set()
    for index, halves in sorted(entries.items()):
        if set(halves) not in ({None}, {0, 1}):
            raise StorageError(f"`{key}` at {list(index)} lacks one of its halves `_w` and `_v`")
        ordered = [halves[half] for half in (None, 0, 1) if half in halves]
        row = 0
        for tensor in ordered:
            lead = tuple(1 for _ in index)
            for chunk in tensor.chunks:
                offsets = (chunk.offsets[0] + row, *chunk.offsets[1:]) if chunk.offsets else ()
                where = (*index, *offsets), (*lead, *chunk.sizes)
                chunks.append(Chunk(*where, chunk.file, chunk.start, chunk.archive_bytes, len(index)))
            row += tensor.shape[0] if tensor.shape else 0
        kinds |= {(tensor.dtype, (row, *tensor.shape[1:]) if tensor.shape else ()) for tensor in ordered}
    if len(kinds) > 1:
        raise StorageError(f"`{key}` differs in shape or dtype from layer to layer: {sorted(kinds)}")
    ((dtype, inner),) = kinds
    return StoredTensor(key, dtype, (*stack, *inner), tuple(chunks))
