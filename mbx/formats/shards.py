"""Where the tensors of a new Hugging Face folder lie: its files as they were, or shards of a bounded size."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.engine.plan import Draft
from converters.errors import StorageError, UsageError
from converters.tensors import StoredTensor, nbytes_of
from mbx.formats.placement import Placement
from mbx.formats.safetensors import build_header
from mbx.untrusted.small_files import INDEX as INDEX_BYTES
from mbx.untrusted.small_files import read_json

if TYPE_CHECKING:
    from mbx.formats.hf import WeightFile

#: How names of weight files begin: Transformers', and diffusers'.
STEM, DIFFUSERS_STEM = STEMS = ("model", "diffusion_pytorch_model")
_INDEX_SUFFIX = ".safetensors.index.json"
INDEX = STEM + _INDEX_SUFFIX


def index_name(files: Collection[str]) -> str:
    """What the index of weight files is called."""
    of_diffusers = bool(files) and all(name.startswith(DIFFUSERS_STEM) for name in files)
    return (DIFFUSERS_STEM if of_diffusers else STEM) + _INDEX_SUFFIX


def place(
    drafts: Iterable[Draft], recorded: tuple[WeightFile, ...] | None, max_shard_bytes: int, stem: str = STEM
) -> Placement:
    """Lay out safetensors files: the recorded ones where the names still fit, else shards of a bounded size.

    Names of new ones begin with `stem`.
    """
    by_name = {draft.name: draft for draft in drafts}
    if recorded is not None and {n for f in recorded for n in f.tensors} >= set(by_name):
        groups: list[tuple[str, list[Draft], WeightFile | None]]
        groups = [(f.name, [by_name[n] for n in f.tensors if n in by_name], f) for f in recorded]
        groups = [group for group in groups if group[1]]
        whole = all(f.header is not None for f in recorded)
        same = whole and {n for f in recorded for n in f.tensors} == set(by_name)
    else:
        shards = _shards(list(by_name.values()), max_shard_bytes, stem)
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
        texts[index_name([name for name, _, _ in groups])] = _index(tensors.values())
    return Placement(tensors, sizes, headers=headers, texts=texts)


def settle_index(placed: Placement, sides: dict[str, Path], texts: dict[str, bytes]) -> None:
    """Leave beside a new folder's weights one index that lists what lies there: the source's own, where it does.

    `sides` and `texts` are the files that are copied and those that are made, by name. StorageError for an index that
    is damaged.
    """
    held = {name: tensor.chunks[0].file for name, tensor in placed.tensors.items()}
    indices, own = [name for name in sides if name.endswith(_INDEX_SUFFIX)], index_name(placed.file_sizes)
    for name in indices:
        if own in texts or _listed(sides[name]) != held:
            del sides[name]
    if len(placed.file_sizes) > 1 and own not in texts and not any(name in sides for name in indices):
        texts[own] = _index(placed.tensors.values())


def _listed(path: Path) -> object:
    """What an index says: the file of every tensor."""
    try:
        return read_json(path, INDEX_BYTES).get("weight_map")
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"`{path}` is damaged: {error}") from error


def _index(tensors: Iterable[StoredTensor]) -> bytes:
    """The text of an index of tensors that lie in one chunk each."""
    held = sorted((tensor.name, tensor.chunks[0].file, tensor.nbytes) for tensor in tensors)
    total = sum(nbytes for _, _, nbytes in held)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, file, _ in held}}
    return (json.dumps(index, indent=2) + "\n").encode()


def _shards(drafts: list[Draft], max_bytes: int, stem: str) -> list[tuple[str, list[Draft]]]:
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
        return [(f"{stem}.safetensors", shards[0])]
    count = len(shards)
    return [(f"{stem}-{n:05d}-of-{count:05d}.safetensors", shard) for n, shard in enumerate(shards, 1)]
