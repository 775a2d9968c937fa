"""Logical tensors stored in the parts of a codec: the way back of `decode`, by the same shape rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from converters.codecs.decode import Encoded, Matrix, read_part
from converters.errors import StorageError, UnsupportedError
from converters.protocols import Source
from converters.tensors import Shape, StoredTensor, nbytes_of


def encodings(encoded: Mapping[str, Encoded]) -> dict[str, Encoded]:
    """`encoded`, a source's headers, with each codec set to write parts as the source has them."""
    out = {}
    for name, whole in encoded.items():
        if not whole.codec.encodes:
            raise UnsupportedError(
                f"{whole.codec.name} is read and not written: `{name}` is stored so in the source",
                hint="leave out ‹codec› same: every tensor is written as it stands",
            )
        dtypes = {role: part.dtype for role, part in whole.parts.items()}
        out[name] = replace(whole, codec=whole.codec.as_stored(dtypes, _shapes(whole)))
    return out


def spans(encoded: Encoded, index: tuple[int, ...], row: int, rows: int) -> Iterator[tuple[str, int, int]]:
    """Bytes that storing rows `[row, row + rows)` of an entry writes: (role, first byte of the part, bytes).

    Rows begin at a multiple of the codec's `encode_alignment`. An `index` picks an entry of the first dimension,
    which is stored as one. A part that every slab needs whole is written with the first.
    """
    start, stop = _slab(index, row, rows)
    for role, part in encoded.parts.items():
        cut = encoded.codec.part_rows(role, start, stop, _shapes(encoded))
        first, last = cut or (0, part.shape[0] if part.shape else 1)
        nbytes = nbytes_of(part.dtype, part.shape[1:])
        if cut is not None or start == 0:
            yield role, first * nbytes, (last - first) * nbytes


def encode_rows(
    source: Source,
    encoded: Encoded,
    scales: Mapping[str, StoredTensor],
    index: tuple[int, ...],
    row: int,
    data: Matrix,
    dtype: str,
) -> list[Matrix]:
    """The bytes of each of `spans`: rows from `row` on of one entry, encoded.

    data: [rows, bytes of a row], values of `dtype`. `scales` are the source's by role, read from `source`; blocks that
    they store without loss keep them.
    Raises StorageError, naming the tensor, for values that the codec cannot store.
    """
    import torch

    from converters.codecs.arithmetic.reencode import reencode
    from converters.torch_casts import TORCH_DTYPES

    codec, whole = encoded.codec, encoded.tensor
    start, stop = _slab(index, row, len(data))
    slab = torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[dtype]).reshape(stop - start, *whole.shape[1:])
    known = {
        role: read_part(source, part, codec.part_rows(role, start, stop, _shapes(encoded)))
        for role, part in scales.items()
    }
    scale = known.pop("scale", None)
    try:
        parts = reencode(codec.holding(known) if known else codec, slab, scale, whole.shape)
    except StorageError as error:
        error.details = (*error.details, f"`{whole.name}`, rows {start} to {stop - 1} of {whole.shape[0]}")
        raise
    out = []
    for role, _, nbytes in spans(encoded, index, row, len(data)):
        stored = parts[role].to(TORCH_DTYPES[encoded.parts[role].dtype]).contiguous()
        out.append(stored.reshape(-1).view(torch.uint8).numpy())
        if out[-1].size != nbytes:
            raise AssertionError(
                f"{codec.name} made {out[-1].size} bytes of `{encoded.parts[role].name}`, not {nbytes}"
            )
    return out


def _slab(index: tuple[int, ...], row: int, rows: int) -> tuple[int, int]:
    return (index[0], index[0] + 1) if index else (row, row + rows)


def _shapes(encoded: Encoded) -> dict[str, Shape]:
    return {role: part.shape for role, part in encoded.parts.items()}
