"""Hugging Face's older `pytorch_model.bin` weights, read where they lie: the pickle's classes are never built.

A folder holds `pytorch_model.bin`, or shards that `pytorch_model.bin.index.json` names. Each is a torch.save
archive of a dict of tensors, which may share storages.
"""

from __future__ import annotations

from pathlib import Path

from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.torchfile.archive import load_archive
from mbx.torchfile.torch_values import TensorStub
from mbx.untrusted.names import is_inside
from mbx.untrusted.small_files import INDEX as INDEX_BYTES
from mbx.untrusted.small_files import read_json
from mbx.untrusted.stand_ins import stand_in

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def has_bin_weights(folder: Path) -> bool:
    """Whether a folder's weights are in this format: safetensors, where there are any, go first."""
    here = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return here and not any(folder.glob("*.safetensors"))


def read_bin_folder(folder: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Every tensor by name, and the files that hold them, relative and sorted.

    Raises StorageError for missing or damaged shards, for a tensor in two of them or in none, for what is no
    tensor, and for one whose elements do not lie row-major.
    """
    wanted = _read_index(folder / INDEX) if (folder / INDEX).is_file() else None
    names = [SINGLE] if wanted is None else sorted(set(wanted.values()))
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise StorageError(f"`{folder / name}` is missing", hint="download the missing files")
        for key, tensor in read_bin_file(folder / name).items():
            if key in tensors:
                raise StorageError(f"`{key}` is in `{tensors[key].chunks[0].file}` and in `{name}`")
            tensors[key] = tensor
    if wanted is not None and (lost := sorted(set(wanted) - set(tensors))):
        raise StorageError(
            f"`{folder / INDEX}` names {len(lost)} tensors that no shard holds: {lost[0]}", details=lost
        )
    return tensors, tuple(names)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path, INDEX_BYTES)["weight_map"]
        found = {str(key): str(file) for key, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"`{path}` is damaged: {error}") from error
    for file in found.values():
        if not is_inside(file):
            raise StorageError(f"`{path}` names `{file}`, which is not in its folder")
    return found


def read_bin_file(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one such file by name; StorageError for a damaged file and for what is no tensor."""
    try:
        loaded, storages = load_archive(path)
    except StorageError as error:
        raise stand_in(path) or error from None
    if not isinstance(loaded, dict):
        raise StorageError(f"`{path}` holds a {type(loaded).__name__}; a dict of tensors was expected")
    out = {}
    for key, value in loaded.items():
        stub = whole_stub(path, key, value)
        start = storages[stub.storage][0] + stub.storage_offset * stub.itemsize
        out[str(key)] = StoredTensor.whole(str(key), stub.dtype, stub.shape, path.name, start)
    return out


def whole_stub(path: Path, name: object, value: object) -> TensorStub:
    """A pickle's entry as a tensor; StorageError for another thing, and for one that does not lie row-major."""
    if not isinstance(value, TensorStub):
        raise StorageError(f"`{path}`: `{name}` is a {type(value).__name__}; a tensor was expected")
    if not value.is_contiguous:
        raise StorageError(f"`{path}`: `{name}` has strides {value.stride}, not those of a whole tensor")
    return value


def safetensors_name(file: str) -> str:
    """What a shard is called once it is a safetensors file."""
    if not file.endswith(".bin"):
        return file
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
