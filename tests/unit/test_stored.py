"""Boxes of stored tensors are what NumPy slices, whatever chunks tile them, in bounded memory and few reads."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import stored
from converters.errors import StorageError
from converters.stored import STRIP_BYTES, read_box, read_rows
from converters.tensors import DTYPE_BITS, Chunk, StoredTensor, nbytes_of
from tests.unit._memory import Bytes, Store, box, raw

MIB = 1 << 20
DTYPES = ("U8", "BF16", "F32", "I64")


def tiling(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that tile a tensor, cut by cut: a grid, or chunks of any sizes."""
    boxes = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[dim]))
        for first, size in ((0, at), (at, sizes[dim] - at)):
            moved = (*offsets[:dim], offsets[dim] + first, *offsets[dim + 1 :])
            boxes.append((moved, (*sizes[:dim], size, *sizes[dim + 1 :])))
    return boxes


def put(name: str, dtype: str, value: Bytes, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[
    StoredTensor, Store
]:  # fmt: skip
    """`value` [*shape, bytes of an element] stored in chunks, a file each, behind a few other bytes."""
    store, chunks = Store(), []
    for number, (offsets, sizes) in enumerate(boxes):
        chunk = Chunk(offsets, sizes, f"{name}.{number}", number % 3)
        data = np.ascontiguousarray(value[box(chunk)]).reshape(-1)
        store.add(chunk.file, np.concatenate((np.full(chunk.start, 255, np.uint8), data)))
        chunks.append(chunk)
    return StoredTensor(name, dtype, value.shape[:-1], tuple(chunks)), store


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_box_is_the_slice(data: st.DataObject) -> None:
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=5)))
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    value = rng.integers(0, 256, (*shape, DTYPE_BITS[dtype] // 8), np.uint8)
    tensor, store = put("w", dtype, value, tiling(draw, shape))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - at)) for at, size in zip(offsets, shape, strict=True))
    near, most = draw(st.sampled_from([(0, 1), (3, 16), (1 << 16, 4 << 20)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "_NEAR_BYTES", near)
        patch.setattr(stored, "STRIP_BYTES", most)
        got = read_box(tensor, store, offsets, sizes)
    wanted = value[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
    assert got.shape == (*sizes, DTYPE_BITS[dtype] // 8) and got.tobytes() == wanted.tobytes()
    assert all(int(touched.max(initial=0)) <= 1 for touched in store.touched.values())
    if shape:  # nothing of rows that the box does not touch
        rows = max(0, sizes[0]) * nbytes_of(dtype, shape[1:])
        assert sum(int(touched.sum()) for touched in store.touched.values()) <= rows


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_of_an_entry_are_its_rows(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    depth = data.draw(st.integers(0, len(shape)))
    value = np.random.default_rng(0).integers(0, 256, (*shape, 2), np.uint8)
    tensor, store = put("w", "BF16", value, tiling(data.draw, shape))
    index = tuple(data.draw(st.integers(0, size - 1)) for size in shape[:depth])
    held = shape[depth] if depth < len(shape) else 1
    row = data.draw(st.integers(0, held - 1))
    rows = data.draw(st.integers(1, held - row))
    wanted = value[index].reshape(held, -1)[row : row + rows]
    assert np.array_equal(read_rows(tensor, store, index, row, rows), wanted)


def test_bytes_that_are_not_stored_are_an_error() -> None:
    value = raw(torch.arange(24, dtype=torch.float32)).reshape(4, 6, 4)
    tensor, store = put("w", "F32", value, [((0, 0), (2, 6)), ((2, 0), (2, 6))])
    short = replace(tensor, chunks=tensor.chunks[:1])
    assert read_box(short, store, (1, 2), (1, 3)).view(np.float32).ravel().tolist() == [8.0, 9.0, 10.0]
    with pytest.raises(StorageError, match="`w`: 12 of 24 bytes of what was asked for are stored"):
        read_box(short, store, (1, 2), (2, 3))
    with pytest.raises(StorageError, match="are stored"):
        read_box(tensor, store, (3, 0), (2, 6))


class Endless:
    """A source of any size whose bytes tell where they lie; counts what is read."""

    def __init__(self) -> None:
        self.nbytes = self.calls = 0

    def data_start(self, chunk: Chunk) -> int:
        return chunk.start

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        self.nbytes += len(buffer)
        self.calls += 1
        buffer[:1] = buffer[-1:] = b"\1"


@pytest.mark.parametrize(
    ("offsets", "sizes", "most_read", "most_calls"),
    [
        ((0, 0, 0), (1, 4096, 4096), 32 * MIB, 1),  # an entry, as it lies
        ((3, 100, 0), (1, 2, 4096), 16 << 10, 1),  # rows of one
        ((0, 0, 0), (1, 4096, 16), 32 * MIB, 16),  # a column: strips of whole rows
        ((0, 0, 0), (8, 1, 16), 8 * 32, 8),  # far apart: nothing between them
        ((0, 7, 5), (8, 1, 1), 8 * 2, 8),
        ((2, 0, 2048), (2, 4096, 2048), 64 * MIB, 32),
    ],
)
def test_a_box_takes_its_own_memory_and_a_strip(
    offsets: tuple[int, ...], sizes: tuple[int, ...], most_read: int, most_calls: int
) -> None:
    tensor = StoredTensor("w", "BF16", (8, 4096, 4096), (Chunk((0, 0, 0), (8, 4096, 4096), "f", 0),))
    source = Endless()
    read_box(tensor, source, (0, 0, 0), (1, 1, 1))
    source.nbytes = source.calls = 0
    tracemalloc.start()
    try:
        got = read_box(tensor, source, offsets, sizes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.nbytes == nbytes_of("BF16", sizes) and source.nbytes <= most_read and source.calls <= most_calls
    assert peak <= got.nbytes + STRIP_BYTES + (64 << 10)
