"""A DCP index of many chunks, to measure how long one takes to read."""

from __future__ import annotations

from pathlib import Path

from converters.tensors import Chunk, StoredTensor
from mbx.formats.files import frame
from mbx.torchfile.dcp import build_dcp_metadata, read_dcp

_ROWS = 256


def write(folder: str, num_chunks: int) -> None:
    """Write the index, and sparse files behind it, of tensors in 256 chunks each."""
    path = Path(folder)
    path.mkdir()
    nbytes = frame("BF16", (8, 128)).total_bytes
    tensors = []
    for number in range(-(-num_chunks // _ROWS)):
        rows = min(_ROWS, num_chunks - number * _ROWS)
        chunks = tuple(Chunk((8 * r, 0), (8, 128), f"__{number % 64}_0.distcp", 0, nbytes) for r in range(rows))
        tensors.append(StoredTensor(f"layers.{number}.weight", "BF16", (8 * rows, 128), chunks))
    ends: dict[str, int] = {}
    placed = []
    for tensor in tensors:
        moved = []
        for chunk in tensor.chunks:
            at = ends.get(chunk.file, 0)
            ends[chunk.file] = at + nbytes
            moved.append(Chunk(chunk.offsets, chunk.sizes, chunk.file, at, nbytes))
        placed.append(StoredTensor(tensor.name, tensor.dtype, tensor.shape, tuple(moved)))
    (path / ".metadata").write_bytes(build_dcp_metadata(placed, {}))
    for file, size in ends.items():
        with (path / file).open("wb") as stream:
            stream.truncate(size)


def read(folder: str, num_chunks: int) -> None:
    """Read it back."""
    found = sum(len(tensor.chunks) for tensor in read_dcp(Path(folder)).tensors.values())
    if found != num_chunks:
        raise AssertionError(f"{found} chunks of {num_chunks} were read")
