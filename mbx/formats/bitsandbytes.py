"""bitsandbytes' 4-bit folders: the shapes that their headers leave out, from the JSON that lies among the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.formats.files import FileSource

_STATE = ".quant_state.bitsandbytes__"
_MOST_BYTES = 1 << 16


def with_shapes(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors`, packed matrices as [out, in/2] in place of the flat column that is stored.

    StorageError where the JSON beside one is damaged, or says another size.
    """
    out = dict(tensors)
    source = FileSource(folder)
    try:
        for name, tensor in tensors.items():
            logical, found, _ = name.partition(_STATE)
            if found and logical in tensors:
                out[logical] = _reshaped(tensors[logical], _shape(source, tensor))
    finally:
        source.close()
    return out


def _shape(source: FileSource, state: StoredTensor) -> tuple[int, int]:
    if state.nbytes > _MOST_BYTES:
        raise StorageError(f"`{state.name}` has {state.nbytes} bytes, which is no state of bitsandbytes")
    raw = bytearray(state.nbytes)
    source.read_into(state.chunks[0].file, state.chunks[0].start, memoryview(raw))
    try:
        rows, columns = json.loads(raw)["shape"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"`{state.name}` is damaged: {error}") from error
    if type(rows) is not int or type(columns) is not int or rows < 1 or columns < 2:
        raise StorageError(f"`{state.name}` says a shape of {rows!r} and {columns!r}"[:300])
    return rows, columns


def _reshaped(tensor: StoredTensor, shape: tuple[int, int]) -> StoredTensor:
    rows, columns = shape
    if columns % 2 or rows * columns // 2 != tensor.nbytes:
        raise StorageError(
            f"`{tensor.name}` holds {tensor.nbytes} bytes; {rows} x {columns} 4-bit values were expected"
        )
    (chunk,) = tensor.chunks
    return StoredTensor.whole(tensor.name, tensor.dtype, (rows, columns // 2), chunk.file, chunk.start)
