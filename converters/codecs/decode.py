"""Tensors that a codec stores in parts, read as the one logical tensor they encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.codecs import Codec, assemble, codecs_for
from converters.errors import StorageError
from converters.protocols import Source
from converters.stored import read_box
from converters.tensors import Shape, StoredTensor

if TYPE_CHECKING:
    import torch

#: Dtypes that no codec stores its codes in.
_PLAIN = frozenset(("BF16", "F16", "F32", "F64", "I64", "BOOL"))
Matrix = npt.NDArray[np.uint8]
#: Values as unsigned integers of their size.
Words = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One logical tensor: its decoded dtype and shape, its codec and the stored part of each role."""

    tensor: StoredTensor
    codec: Codec
    parts: Mapping[str, StoredTensor]


def decoded_view(
    stored: Mapping[str, StoredTensor], quantization: Mapping[str, object] | None
) -> tuple[dict[str, StoredTensor], dict[str, Encoded]]:
    """`stored` with every set of parts replaced by the tensor it encodes, and the encoded ones by name.

    Logical tensors have no chunks: their bytes come from `read_decoded`. Nothing changes without a quantization
    config, or where it is left over from a source whose tensors are all plain by now. UnsupportedError for a method
    that no codec reads.
    """
    named = quantization is not None and isinstance(quantization.get("quant_method"), str)
    if quantization is None or named and all(tensor.dtype in _PLAIN for tensor in stored.values()):
        return dict(stored), {}
    codecs = codecs_for(quantization)
    view, encoded = dict(stored), {}
    for logical, codec in assemble(codecs, stored).items():
        parts = {role: stored[name] for role, name in codec.part_names(logical).items()}
        try:
            shape = codec.decoded_shape({role: part.shape for role, part in parts.items()})
        except StorageError as error:
            raise StorageError(f"`{logical}`: {error.fact}", hint=error.hint) from error
        for part in parts.values():
            view.pop(part.name, None)
        dtype = codec.decoded_dtype({role: part.dtype for role, part in parts.items()})
        tensor = StoredTensor(logical, dtype, shape, ())
        view[logical] = tensor
        encoded[logical] = Encoded(tensor, codec, parts)
    discards = tuple(suffix for codec in codecs for suffix in codec.discards)
    for name in [name for name in view if name.endswith(discards)] if discards else ():
        del view[name]
    return view, encoded


def read_decoded(source: Source, encoded: Encoded, index: tuple[int, ...], row: int, rows: int) -> Words:
    """Decoded rows `[row, row + rows)` of one entry, shape [rows, elements of a row], in any strides.

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


def discarded(
    stored: Mapping[str, StoredTensor], view: Mapping[str, StoredTensor], encoded: Mapping[str, Encoded]
) -> tuple[StoredTensor, ...]:
    """Tensors that `decoded_view` leaves out and no value is made of: activation scales."""
    parts = {part.name for whole in encoded.values() for part in whole.parts.values()}
    return tuple(tensor for name, tensor in stored.items() if name not in view and name not in parts)


def _slab(source: Source, encoded: Encoded, start: int, stop: int) -> Words:
    import torch

    from converters.torch_casts import TORCH_DTYPES

    shapes: dict[str, Shape] = {role: part.shape for role, part in encoded.parts.items()}
    parts = {
        role: read_part(source, part, encoded.codec.part_rows(role, start, stop, shapes))
        for role, part in encoded.parts.items()
    }
    _check_scales(encoded, parts)
    decoded = encoded.codec.decode(parts, dtype=TORCH_DTYPES[encoded.tensor.dtype])
    item = decoded.element_size()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item]
    words: Words = decoded.view(signed).numpy().view(f"u{item}")
    return words


def _check_scales(encoded: Encoded, parts: Mapping[str, torch.Tensor]) -> None:
    """Refuse scales that destroy their block: NaN, infinite, or zero under codes that are not."""
    from converters.codecs.arithmetic.common import scale_faults, scale_to_fp32

    if (scale := parts.get("scale")) is None:
        return
    faults = scale_faults(scale)
    faults.pop("negative", None)  # odd, and nothing is lost
    if "zero" in faults:
        # A block of zeros may have any scale: codes count only under the zeros, read as ones.
        ones = (scale_to_fp32(scale) == 0).to(scale.dtype)
        if not encoded.codec.zero_scale_is_a_fault or not bool(encoded.codec.decode({**parts, "scale": ones}).any()):
            del faults["zero"]
    if faults:
        part = encoded.parts["scale"]
        what = ", ".join(f"{count} of {scale.numel()} are {kind}" for kind, count in faults.items())
        raise StorageError(
            f"`{part.name}` in `{part.chunks[0].file}` scales `{encoded.tensor.name}`: {what}",
            hint="the weights under them are lost: download the file again, or ask who quantised it",
        )


def read_part(source: Source, part: StoredTensor, cut: tuple[int, int] | None) -> torch.Tensor:
    """Rows `cut` of a stored part, all of it for None; StorageError where it does not lie in one chunk."""
    import torch

    from converters.torch_casts import TORCH_DTYPES

    if len(part.chunks) != 1:
        raise StorageError(f"`{part.name}` is stored in {len(part.chunks)} chunks; encoded parts must be whole")
    first = tuple(0 for _ in part.shape) if cut is None else (cut[0], *(0 for _ in part.shape[1:]))
    shape = part.shape if cut is None else (cut[1] - cut[0], *part.shape[1:])
    data = read_box(part, source, first, shape)
    return torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[part.dtype]).reshape(shape)
