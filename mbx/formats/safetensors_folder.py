"""A folder of safetensors files: which of them are the model, by their index or by themselves."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.formats.safetensors import MAX_HEADER_BYTES, load_json, read_header
from mbx.formats.shards import STEM, STEMS
from mbx.untrusted.names import is_inside
from mbx.untrusted.small_files import read_small

#: Copies that are passed over and named one by one.
_FEW = 5
#: Missing files that an error names.
_SHOWN = 100
_INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class SafetensorsFolder:
    """Every tensor of a folder, the files that hold them (relative names, sorted), and the shards' metadata.

    `passed_over` are files with copies of tensors that the index reads from others, and an index that does not count;
    `notes` what a user should know.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]
    metadata: dict[str, str]
    passed_over: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def read_folder(folder: Path) -> SafetensorsFolder:
    """Every tensor of a folder of safetensors files; links are followed.

    Reads the shards of `model.safetensors.index.json` (or the folder's only `*.safetensors.index.json`), else
    `model.safetensors`, else all `*.safetensors`; diffusers' names are as good. The index decides where a tensor is
    that lies in two shards; one of another cutting is passed over where the shards hold what it lists, each tensor
    once, and so are further indices, of other forms of the model. Raises StorageError for missing shards, for tensors
    that index and shards do not agree on, for a name in two shards that no index settles, and when there are no
    weights.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder")
    index = found = _find_index(folder)
    weight_map = None if index is None else _read_index(index)
    names = _unindexed_shards(folder) if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    notes, passed_over = list[str](), set[str]()
    if missing and index is not None and weight_map is not None:
        names = _of_another_cutting(folder, weight_map, missing)
        notes.append(f"{index.name} is of another cutting, and passed over: the files here hold all that it lists")
        passed_over.add(index.name)
        index = weight_map = None
    for other in sorted(path.name for path in folder.glob(f"*{_INDEX_SUFFIX}") if path not in (index, found)):
        notes.append(f"not carried: {other}, which lists the files of other weights than were read")
        passed_over.add(other)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    twice: list[str] = []
    stale: dict[str, str] = {}
    for name in names:
        header = read_header(folder / name)
        metadata.update(header.metadata)
        for key, (dtype, shape, start, _) in header.tensors.items():
            if weight_map is not None and key in weight_map and weight_map[key] != name and weight_map[key] in names:
                stale[key] = name
                continue
            if key in tensors:
                twice.append(f"{key}: in {tensors[key].chunks[0].file} and in {name}")
                continue
            tensors[key] = StoredTensor.whole(key, dtype, shape, name, header.data_start + start)
    if twice:
        raise StorageError(
            f"{folder}: {len(twice)} tensors are in two shards: {twice[0]}",
            hint="no index says which one counts: remove the file that is out of date, or add "
            "model.safetensors.index.json",
            details=twice,
        )
    notes += [f"`{key}`: the copy in {name} is passed over" for key, name in stale.items() if key in tensors]
    if index is not None and weight_map is not None:
        _check_index(index, weight_map, tensors)
    if not tensors:
        raise StorageError(f"{folder}: its safetensors files hold no tensors")
    return SafetensorsFolder(
        folder,
        tensors,
        tuple(names),
        metadata,
        frozenset(passed_over | set(stale.values())),
        tuple(_few(notes, "tensors")),
    )


def index_beside_bin(folder: Path, tensors: Collection[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Safetensors indices of a folder whose weights, `tensors` by name, are pickles: their names, and a note of each.

    None of the files that they list is here. StorageError where `model.safetensors.index.json` lists tensors that the
    pickles do not hold: then they are another model's, or not all of it.
    """
    names = sorted(path.name for path in folder.glob(f"*{_INDEX_SUFFIX}"))
    preferred = f"model{_INDEX_SUFFIX}"
    if preferred in names:
        listed = _read_index(folder / preferred)
        if lost := sorted(set(listed) - set(tensors)):
            shards = sorted(set(listed.values()))
            raise StorageError(
                f"{folder}: {len(shards)} of {len(shards)} shards are missing: {shards[0]}",
                hint=f"the pickles that are here hold {len(listed) - len(lost)} of the {len(listed)} tensors of "
                f"{preferred}; download the shards: `hf download ORG/NAME --local-dir {folder}`, or remove the index "
                "where the pickles alone are the model",
                details=lost,
            )
    notes = (f"not carried: {name}, none of whose files is here: the pickles were read" for name in names)
    return frozenset(names), tuple(notes)


def _few(notes: list[str], what: str) -> list[str]:
    """The first notes of many, and how many more there are."""
    return notes if len(notes) <= _FEW else [*notes[:_FEW], f"… and {len(notes) - _FEW} more {what}"]


def _of_another_cutting(folder: Path, weight_map: Mapping[str, str], missing: list[str]) -> list[str]:
    """The folder's files where they hold every tensor of an index once, and no others; else StorageError."""
    wanted = len(set(weight_map.values()))
    here = sorted(path.name for path in folder.glob("*.safetensors"))
    lack = f"{folder}: {len(missing)} of {wanted} shards are missing: {missing[0]}"
    try:
        held = [key for name in here for key in read_header(folder / name).tensors]
    except StorageError as error:
        raise StorageError(lack, hint=f"download them; {error.fact}", details=missing) from error
    if sorted(held) == sorted(weight_map):
        return here
    known = len(set(held) & set(weight_map))
    raise StorageError(
        lack,
        hint=f"the {len(here)} files that are here hold {known} of its {len(weight_map)} tensors; download the rest: "
        f"`hf download ORG/NAME --local-dir {folder}`",
        details=missing,
    )


def _find_index(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    for preferred in (folder / f"{stem}{_INDEX_SUFFIX}" for stem in STEMS):
        if preferred in found:
            return preferred
    if len(found) > 1:
        names = [path.name for path in found]
        raise StorageError(f"{folder}: {len(found)} index files and none is {STEM}{_INDEX_SUFFIX}", details=names)
    return found[0] if found else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = read_small(path, MAX_HEADER_BYTES)
    except OSError as exc:
        raise StorageError(f"{path}: cannot be read: {exc.strerror}") from exc
    given = load_json(raw, str(path)).get("weight_map")
    if not isinstance(given, dict) or not given:
        raise StorageError(f"{path}: no weight_map")
    weight_map: dict[str, str] = {}
    for tensor, shard in given.items():
        if not isinstance(shard, str) or not is_inside(shard):
            raise StorageError(f"{path}: tensor '{tensor}' must name a file in this folder, got {shard!r}"[:500])
        weight_map[tensor] = shard
    stem = next((stem for stem in STEMS if path.name == stem + _INDEX_SUFFIX), STEM)
    single = path.with_name(f"{stem}.safetensors")
    whole = all((path.parent / name).is_file() for name in set(weight_map.values()))
    if single.is_file() and whole and single.name not in weight_map.values():
        raise StorageError(
            f"{path.parent}: both {single.name} and {path.name} are there, and the index does not name the file",
            hint="remove the one that is out of date",
        )
    return weight_map


def _no_weights(folder: Path) -> StorageError:
    """What to say of a folder without safetensors files, by what it has in their place."""
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith((".gguf", ".onnx", ".incomplete")))
    hint = "expected model.safetensors or model.safetensors.index.json"
    if any(name.endswith(".incomplete") for name in others):
        hint = f"a download was broken off: `hf download ORG/NAME --local-dir {folder}` goes on"
    elif others:
        hint = f"`{others[0]}` was made from a model's safetensors: convert the folder or repository that has those"
    return StorageError(f"{folder}: no safetensors weights", hint=hint, details=others)


def _unindexed_shards(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _no_weights(folder)
    for stem in STEMS:  # the file that the library reads; others beside it are adapters and copies
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
    sets: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, count), found in sets.items():
        missing = (number for number in range(1, int(count) + 1) if number not in found)
        if (lacks := int(count) - len(found)) > 0:
            shown = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in islice(missing, _SHOWN)]
            raise StorageError(
                f"{folder}: {lacks} of {int(count)} shards are missing: {shown[0]}",
                hint="download the missing files",
                details=shown,
            )
    return names


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    wrong: list[str] = []
    for name, shard in weight_map.items():
        if name not in tensors:
            wrong.append(f"{name}: in the index, in no shard")
        elif tensors[name].chunks[0].file != shard:
            wrong.append(f"{name}: in {tensors[name].chunks[0].file}, the index says {shard}")
    wrong += [f"{n}: in {t.chunks[0].file}, not in the index" for n, t in tensors.items() if n not in weight_map]
    if wrong:
        raise StorageError(
            f"{path}: {len(wrong)} tensors do not agree with the shards: {wrong[0]}",
            hint="index and shards are of two versions: download both again, or remove the index where the shards "
            "alone are the model",
            details=wrong,
        )
