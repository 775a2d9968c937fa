"""Checkpoints of strangers for torch's and Megatron Core's own loaders: nothing that a folder names is run.

Megatron Core reads `.metadata` with `pickle.load`, and the objects beside the tensors (`common.pt`, random states,
`_extra_state`) with torch's full unpickler. Here the inert reader looks at all of them first and refuses classes that
a checkpoint has no need of; then the loaders get an index that was parsed rather than unpickled, and torch's
restricted unpickler. This file imports torch when imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from converters.errors import StorageError
from mbx.torchfile.archive import file_reader, load_archive, read_object
from mbx.torchfile.dcp import METADATA_NAME, read_dcp, read_index
from mbx.torchfile.dcp_metadata import TensorEntry
from mbx.torchfile.pickle_machine import Factory, FindGlobal, run_pickle
from mbx.torchfile.pickle_plain import PLAIN_GLOBALS, load_storage
from mbx.torchfile.pickles import global_finder
from mbx.torchfile.torch_values import TORCH_NAMES, Opaque, TensorStub
from mbx.untrusted.names import inside
from mbx.untrusted.small_files import open_regular

#: Classes of NumPy's arrays and scalars, in which random states are saved (`mbx/train/checkpoints/random_streams.py`).
_NUMPY = tuple(
    f"{module}.{name}"
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    for name in ("_reconstruct", "scalar", "ndarray", "dtype")
)
#: What a pickle within Transformer Engine's `_extra_state` names: the FP8 recipe, and tensors by their storages.
_TE_RECIPES = tuple(
    f"transformer_engine.common.recipe.{name}"
    for name in (
        *("Recipe", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"),
        *("NVFP4BlockScaling", "CustomRecipe", "Format", "_FormatHelper", "_OverrideLinearPrecision", "MMParams"),
        "QParams",
    )
)

#: Megatron Core's own recipe, of delayed scaling.
_CORE_RECIPES = ("megatron.core.extensions.transformer_engine.TEDelayedScaling",)
#: What makes a tensor's storage of bytes: torch's function, and what Megatron Core puts in its place since 0.17.1.
_STORAGES = ("torch.storage._load_from_bytes", "megatron.core.safe_globals.safe_load_from_bytes")
_EXTRA_STATE = frozenset((*_TE_RECIPES, *_CORE_RECIPES, *_STORAGES, "_io.BytesIO", "io.BytesIO"))
_OBJECTS = frozenset((*_NUMPY, "_io.BytesIO", "io.BytesIO", "builtins.bytearray", "builtins.complex"))
_PICKLE_START = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def torch_index(iteration: Path) -> Metadata:
    """`.metadata` of a DCP folder in torch's classes, made from what the inert reader took of it.

    A saver's own data (planner, storage) are left out; torch's reader needs neither. StorageError where the index
    cannot be read, or names files outside the folder.
    """
    parsed = read_index(iteration)
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in parsed.state_dict_metadata.items():
        if not isinstance(entry, TensorEntry):
            stored[name] = BytesStorageMetadata()
            continue
        dtype = getattr(torch, TORCH_NAMES[entry.dtype])
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in entry.chunks]
        stored[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry.size), chunks)
    source = str(iteration / METADATA_NAME)
    places = {
        MetadataIndex(name, None if at is None else torch.Size(at)): _StorageInfo(
            inside(blob.relative_path, source), blob.offset, blob.length
        )
        for (name, at), blob in parsed.storage_data.items()
    }
    return Metadata(stored, None, places, StorageMeta())


@contextmanager
def inert_loading(iteration: Path) -> Iterator[None]:
    """Within it, torch and Megatron Core load `iteration`, and state dicts made from it, and run none of its code.

    Raises StorageError, before they see the folder, where an object in it names a class that is not known.
    """
    _check_objects(iteration)

    def read_metadata(self: FileSystemReader, *_: object, **__: object) -> Metadata:
        return torch_index(Path(self.path))

    with (
        patch.object(FileSystemReader, "read_metadata", read_metadata),
        patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}),
        torch.serialization.safe_globals(_unknown_to_torch()),
    ):
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
        yield


def _unknown_to_torch() -> list[Any]:
    """The classes that `_OBJECTS` allows and torch's restricted unpickler does not know yet.

    Those that it knows stay out: leaving the context would take from it what Megatron Core told it for good.
    """
    import argparse
    import io

    import numpy

    multiarray = getattr(numpy, "_core", None) or numpy.core
    dtypes = {type(numpy.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    wanted = [
        argparse.Namespace,
        io.BytesIO,
        numpy.ndarray,
        numpy.dtype,
        multiarray.multiarray._reconstruct,
        multiarray.multiarray.scalar,
        *dtypes,
    ]
    known = torch.serialization.get_safe_globals()
    return [one for one in wanted if one not in known]


def _check_objects(iteration: Path) -> None:
    """Read every object of a checkpoint inertly; StorageError for one that names a class that is not known."""
    common = iteration / "common.pt"
    if common.is_file():
        load_archive(common, unknown=_OBJECTS)
    files: dict[str, int] = {}
    try:
        for name, (file, start, length) in read_dcp(iteration).objects.items():
            if file not in files:
                files[file] = open_regular(iteration / file)
            _check_object(name, files[file], start, length, f"{iteration / file}: `{name}`")
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _check_object(name: str, descriptor: int, start: int, length: int, source: str) -> None:
    value, storages = read_object(file_reader(descriptor, start), length, unknown=_OBJECTS, source=source)
    if "_extra_state" not in name:
        return
    for stub in _bytes_within(value):
        offset, nbytes = storages[stub.storage]
        data = os.pread(descriptor, nbytes, start + offset)
        if data.startswith(_PICKLE_START):  # Transformer Engine unpickles it when the module is loaded
            run_pickle(data, _extra_state_finder(source), load_storage, source=source)
        elif any(data):
            raise StorageError(f"{source}: bytes that are no state of Transformer Engine")


def _extra_state_finder(source: str) -> FindGlobal:
    """Names within a state of Transformer Engine: tensors stay Opaque, for their storages are bytes in the pickle.

    Those bytes are a file of `torch.save` again, which `inert_loading` has torch read with its restricted unpickler.
    """
    known = global_finder(unknown=_EXTRA_STATE, source=source)

    def find_global(module: str, name: str) -> object:
        full = f"{module}.{name}"
        if module.startswith("torch.") and full in PLAIN_GLOBALS:
            return Factory(full, lambda args: Opaque(full, args))
        return known(module, name)

    return find_global


def _bytes_within(value: object) -> Iterator[TensorStub]:
    """The tensors of bytes in an object, wherever they stand."""
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if isinstance(item, TensorStub):
            if item.dtype in ("U8", "I8"):
                yield item
        elif isinstance(item, list | tuple | Mapping) and id(item) not in seen:
            seen.add(id(item))
            pending += item.values() if isinstance(item, Mapping) else item
