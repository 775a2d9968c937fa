"""Tensors that a codec stores in parts, read as the one logical tensor they encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError
from converters.protocols import Source
from converters.tensors import Shape, StoredTensor, nbytes_of

if TYPE_CHECKING:
    import torch

    from converters.codecs import Codec

Matrix = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One logical tensor: its decoded dtype and shape, its codec and the stored part of each role."""

    tensor: StoredTensor
    codec: Codec
    parts: Mapping[str, StoredTensor]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def decoded_view(
    stored: Mapping[str, StoredTensor], quantization: Mapping[str, object] | None
) -> tuple[dict[str, StoredTensor], dict[str, Encoded]]:
    """`stored` with every set of parts replaced by the tensor it encodes, and the encoded ones by name.

    Logical tensors have no chunks: their bytes come from `read_decoded`. Without a quantization config nothing
    changes and torch is not imported.
    """
    if quantization is None:
        return dict(stored), {}
    from converters.codecs import assemble, codecs_for

    codecs = codecs_for(quantization)
    view, encoded = dict(stored), {}
    for logical, codec in assemble(codecs, stored).items():
        parts = {role: stored[name] for role, name in codec.part_names(logical).items()}
        shape = codec.decoded_shape({role: part.shape for role, part in parts.items()})
        for part in parts.values():
            view.pop(part.name, None)
        tensor = StoredTensor(logical, codec.decoded_dtype, shape, ())
        view[logical] = tensor
        encoded[logical] = Encoded(tensor, codec, parts)
    discarded = [name for name in view if any(codec.is_discarded(name) for codec in codecs)]
    for name in discarded:
        del view[name]
    return view, encoded


def read_decoded(source: Source, encoded: Encoded, index: tuple[int, ...], row: int, rows: int) -> Matrix:
    """Decoded rows `[row, row + rows)` of one entry, shape [rows, bytes of a row].

    `index` picks an entry of the first dimension, which codecs cut at, or is empty. Rows are read block-aligned.
    """
    codec, tensor = encoded.codec, encoded.tensor
    if index:
        entry = _slab(source, encoded, index[0], index[0] + 1)
        return entry.reshape(tensor.shape[1], -1)[row : row + rows]
    step = codec.row_alignment(tensor.shape)
    start = row // step * step
    stop = min(-(-(row + rows) // step) * step, tensor.shape[0])
    slab = _slab(source, encoded, start, stop).reshape(stop - start, -1)
    return slab[row - start : row - start + rows]


def _slab(source: Source, encoded: Encoded, start: int, stop: int) -> Matrix:
    import torch

    from converters.values import TORCH_DTYPES

    shapes: dict[str, Shape] = {role: part.shape for role, part in encoded.parts.items()}
    parts = {}
    for role, part in encoded.parts.items():
        cut = encoded.codec.part_rows(role, start, stop, shapes)
        parts[role] = _part_rows(source, part, cut).view(TORCH_DTYPES[part.dtype]).reshape(_cut_shape(part, cut))
    decoded = encoded.codec.decode(parts, dtype=TORCH_DTYPES[encoded.tensor.dtype])
    return decoded.reshape(-1).view(torch.uint8).numpy()


def _cut_shape(part: StoredTensor, cut: tuple[int, int] | None) -> Shape:
    return part.shape if cut is None else (cut[1] - cut[0], *part.shape[1:])


def _part_rows(source: Source, part: StoredTensor, cut: tuple[int, int] | None) -> torch.Tensor:
    import torch

    if len(part.chunks) != 1:
        raise StorageError(f"`{part.name}` is stored in {len(part.chunks)} chunks; encoded parts must be whole")
    chunk = part.chunks[0]
    shape = _cut_shape(part, cut)
    data = np.empty(nbytes_of(part.dtype, shape), np.uint8)
    skip = 0 if cut is None else nbytes_of(part.dtype, (cut[0], *part.shape[1:]))
    if data.size:
        source.read_into(chunk.file, source.data_start(chunk) + skip, data.data)
    return torch.from_numpy(data)


def with_scale_dtype(codec: Codec, parts: Mapping[str, StoredTensor]) -> Codec:
    """`codec` set to write scales in the dtype the source stores them in."""
    scale = parts.get("scale")
    return replace(codec, scale_dtype=scale.dtype) if scale and hasattr(codec, "scale_dtype") else codec  # type: ignore[type-var]
