"""Where the tensors of a new Hugging Face folder lie: its files as they were, or shards of a bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from converters.engine.plan import Draft
from converters.errors import UsageError
from converters.tensors import StoredTensor, nbytes_of
from mbx.formats.placement import Placement
from mbx.formats.safetensors import build_header

if TYPE_CHECKING:
    from mbx.formats.hf import WeightFile

INDEX = "model.safetensors.index.json"


def place(drafts: Iterable[Draft], recorded: tuple[WeightFile, ...] | None, max_shard_bytes: int) -> Placement:
    """Lay out safetensors files: the recorded ones where the names still fit, else shards of a bounded size."""
    by_name = {draft.name: draft for draft in drafts}
    if recorded is not None and {n for f in recorded for n in f.tensors} >= set(by_name):
        groups: list[tuple[str, list[Draft], WeightFile | None]]
        groups = [(f.name, [by_name[n] for n in f.tensors if n in by_name], f) for f in recorded]
        groups = [group for group in groups if group[1]]
        whole = all(f.header is not None for f in recorded)
        same = whole and {n for f in recorded for n in f.tensors} == set(by_name)
    else:
        shards = _shards(list(by_name.values()), max_shard_bytes)
        groups = [(name, members, None) for name, members in shards]
        same = False
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for name, members, old in groups:
        described = [(d.name, d.dtype, d.shape) for d in members]
        unchanged = old is not None and [(n, t.dtype, t.shape) for n, t in old.tensors.items()] == described
        if old is not None and old.header is not None and unchanged:
            header = len(old.header).to_bytes(8, "little") + old.header
        else:
            header = build_header([StoredTensor(*parts, ()) for parts in described], {"format": "pt"})
        at = len(header)
        for draft in members:
            tensors[draft.name] = StoredTensor.whole(draft.name, draft.dtype, draft.shape, name, at)
            at += tensors[draft.name].nbytes
        headers[name], sizes[name] = header, at
    texts = {}
    if len(groups) > 1 and not same:
        total = sum(nbytes_of(d.dtype, d.shape) for d in by_name.values())
        weight_map = {d.name: name for name, members, _ in groups for d in members}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return Placement(tensors, sizes, headers=headers, texts=texts)


def _shards(drafts: list[Draft], max_bytes: int) -> list[tuple[str, list[Draft]]]:
    if max_bytes < 1:
        raise UsageError(f"a shard cannot be {max_bytes} bytes")
    shards: list[list[Draft]] = [[]]
    room = max_bytes
    for draft in drafts:
        nbytes = nbytes_of(draft.dtype, draft.shape)
        if shards[-1] and nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(draft)
        room -= nbytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    count = len(shards)
    return [(f"model-{n:05d}-of-{count:05d}.safetensors", shard) for n, shard in enumerate(shards, 1)]
