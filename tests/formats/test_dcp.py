"""DCP folders, with torch.distributed.checkpoint's own reader and writer as the oracles."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import StorageError
from converters.tensors import Chunk, Shape, StoredTensor
from mbx.torchfile.archive import extra_state_archive, file_reader, locate_tensor, tensor_archive
from mbx.torchfile.dcp import DcpCheckpoint, StoredObject, build_dcp_metadata, read_dcp
from mbx.torchfile.dcp_metadata import BlobEntry, DcpMetadata, TensorEntry, dump_dcp_metadata, load_dcp_metadata
from mbx.torchfile.tiling import Box, tiling_fault
from mbx.torchfile.torch_values import TORCH_DTYPES, TORCH_NAMES

PEERS = os.environ.get("MBX_PEER_CHECKPOINTS")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def slices(offsets: Shape, sizes: Shape) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))


def halves(shape: Shape) -> list[Box]:
    """Two boxes along the first dim, or one where there is nothing to cut."""
    if not shape or shape[0] < 2:
        return [((0,) * len(shape), shape)]
    cut, rest = shape[0] // 2, (0,) * (len(shape) - 1)
    return [((0, *rest), (cut, *shape[1:])), ((cut, *rest), (shape[0] - cut, *shape[1:]))]


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], objects: tuple[str, ...] = ()
) -> tuple[list[StoredTensor], dict[str, StoredObject]]:
    """Writes tensors in two files with the frames of mbx, as an engine would."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: bytearray() for name in ("__0_0.distcp", "__0_1.distcp")}
    stored: list[StoredTensor] = []
    for name, tensor in tensors.items():
        dtype = TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        chunks = []
        for (offsets, sizes), (file, content) in zip(halves(tuple(tensor.shape)), files.items(), strict=False):
            data, frame = raw(tensor[slices(offsets, sizes)]), tensor_archive(dtype, sizes)
            chunks.append(Chunk(offsets, sizes, file, len(content), frame.total_bytes))
            content += frame.prefix + data + frame.suffix(zlib.crc32(data))
        stored.append(StoredTensor(name, dtype, tuple(tensor.shape), tuple(chunks)))
    listed: dict[str, StoredObject] = {}
    for name in objects:
        content, payload = files["__0_1.distcp"], extra_state_archive()
        listed[name] = ("__0_1.distcp", len(content), len(payload))
        content += payload
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / ".metadata").write_bytes(build_dcp_metadata(stored, listed))
    return stored, listed


def read_tensor(checkpoint: DcpCheckpoint, name: str) -> torch.Tensor:
    """A tensor put together from its chunks' raw bytes."""
    stored = checkpoint.tensors[name]
    dtype = getattr(torch, TORCH_NAMES[stored.dtype])
    whole = torch.empty(stored.shape, dtype=dtype)
    for chunk in stored.chunks:
        with (checkpoint.path / chunk.file).open("rb") as file:
            found = locate_tensor(file_reader(file.fileno(), chunk.start), chunk.archive_bytes)
            file.seek(chunk.start + found.data_offset)
            data = file.read(found.nbytes)
        assert (found.dtype, found.shape) == (stored.dtype, chunk.sizes)
        piece = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        whole[slices(chunk.offsets, chunk.sizes)] = piece.reshape(chunk.sizes)
    return whole


def sample() -> dict[str, torch.Tensor]:
    tensors = {f"w.{n}": torch.arange(35).remainder(2).reshape(5, 7).to(getattr(torch, n)) for n in TORCH_DTYPES}
    return {**tensors, "stacked": torch.randn(4, 3, 2), "scalar": torch.tensor(2.5), "vector": torch.randn(9)}


def test_torch_loads_what_is_written_here(tmp_path: Path) -> None:
    tensors = sample()
    write_checkpoint(tmp_path, tensors, ("m._extra_state/shard_0_1",))
    target: dict[str, object] = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    target["m._extra_state/shard_0_1"] = None
    torch_dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    for name, tensor in tensors.items():
        loaded = target[name]
        assert isinstance(loaded, torch.Tensor)
        assert raw(loaded) == raw(tensor), name
    extra = target["m._extra_state/shard_0_1"]
    assert isinstance(extra, list)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in extra] == [(torch.uint8, (0,))]


def test_what_torch_saves_is_read_here(tmp_path: Path) -> None:
    tensors = sample()
    state = {"model": tensors, "step": 3, "nested": {"list": [torch.ones(2), "x"]}}
    torch_dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = read_dcp(tmp_path)
    assert checkpoint.tensors.keys() >= {f"model.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert raw(read_tensor(checkpoint, f"model.{name}")) == raw(tensor), name
    assert "step" in checkpoint.objects
    file, start, length = checkpoint.objects["step"]
    assert torch.load(io.BytesIO((tmp_path / file).read_bytes()[start : start + length]), weights_only=False) == 3
    assert checkpoint.files == ("__0_0.distcp",)


def test_reading_inverts_writing(tmp_path: Path) -> None:
    tensors = sample()
    stored, objects = write_checkpoint(tmp_path, tensors, ("a", "b"))
    checkpoint = read_dcp(tmp_path)
    assert list(checkpoint.tensors.values()) == stored
    assert checkpoint.objects == objects
    assert checkpoint.files == ("__0_0.distcp", "__0_1.distcp")
    assert all(torch.equal(read_tensor(checkpoint, n), t) for n, t in tensors.items() if not n.startswith("w.float8"))


def damaged(folder: Path, change: Callable[[DcpMetadata], DcpMetadata]) -> Path:
    write_checkpoint(folder, {"w": torch.zeros(4, 2), "v": torch.zeros(3)}, ("o",))
    metadata = load_dcp_metadata((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(dump_dcp_metadata(change(metadata)))
    return folder


def with_chunks(*chunks: Box) -> Callable[[DcpMetadata], DcpMetadata]:
    def change(metadata: DcpMetadata) -> DcpMetadata:
        return replace(
            metadata, state_dict_metadata={**metadata.state_dict_metadata, "w": TensorEntry("F32", (4, 2), chunks)}
        )

    return change


def with_blob(blob: BlobEntry | None) -> Callable[[DcpMetadata], DcpMetadata]:
    def change(metadata: DcpMetadata) -> DcpMetadata:
        storage = {key: value for key, value in metadata.storage_data.items() if key != ("w", (0, 0))}
        if blob is not None:
            storage["w", (0, 0)] = blob
        return replace(metadata, storage_data=storage)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_chunks(((0, 0), (2, 2))), r"tensor 'w'.*its 1 chunks leave a hole: they have 4 elements, it has 8"),
        (with_chunks(((0, 0), (2, 2)), ((1, 0), (2, 2))), r"tensor 'w'.*\(0, 0\) and \(1, 0\) overlap"),
        (with_chunks(((0, 0), (2, 2)), ((2, 0), (3, 2))), r"does not hold the chunk at \(2, 0\) of \(3, 2\)"),
        (with_chunks(((0,), (2,)), ((2,), (2,))), r"has a chunk at \(0,\) of \(2,\)"),
        (with_chunks(((0, 0), (4, 1)), ((0, 1), (4, 1))), r"tensor 'w' at \(0, 1\) has no data"),
        (with_chunks(((0, 0), (4, 2))), r"1 stored chunks belong to no tensor: w at \(2, 0\)"),
        (with_blob(None), r"tensor 'w' at \(0, 0\) has no data"),
        (with_blob(BlobEntry("../x", 0, 500)), r"'w' lies in '../x', outside the checkpoint"),
        (with_blob(BlobEntry("/etc/passwd", 0, 500)), "outside the checkpoint"),
        (with_blob(BlobEntry("absent.distcp", 0, 500)), "absent.distcp: 1 chunks lie in it, but: No such file"),
        (with_blob(BlobEntry("__0_0.distcp", 0, 9999999)), "overlaps what ends at 9999999|cut short"),
        (with_blob(BlobEntry("__0_1.distcp", 10, 500)), "overlaps what ends at"),
        (with_blob(BlobEntry("__0_0.distcp", 0, 8)), r"needs 16 bytes and an archive around them, got 8"),
    ],
)
def test_unsound_checkpoints_are_refused(
    tmp_path: Path, change: Callable[[DcpMetadata], DcpMetadata], message: str
) -> None:
    read_dcp(damaged(tmp_path / "control", lambda metadata: metadata))
    with pytest.raises(StorageError, match=message):
        read_dcp(damaged(tmp_path / "damaged", change))


def test_files_that_are_absent_or_cut_short(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no .metadata") as caught:
        read_dcp(tmp_path)
    assert "iter_" in str(caught.value.hint)
    write_checkpoint(tmp_path, {"w": torch.zeros(4, 2)})
    file = tmp_path / "__0_1.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match="__0_1.distcp: cut short: 'w' ends at byte"):
        read_dcp(tmp_path)


def test_what_cannot_be_written_is_refused() -> None:
    whole = Chunk((0,), (4,), "f", 0, 600)
    tensor = StoredTensor("w", "F32", (4,), (whole,))
    with pytest.raises(StorageError, match="'w' cannot stand in one checkpoint twice"):
        build_dcp_metadata([tensor, tensor], {})
    with pytest.raises(StorageError, match="object 'w' cannot stand"):
        build_dcp_metadata([tensor], {"w": ("f", 600, 10)})
    with pytest.raises(StorageError, match="not framed as an archive"):
        build_dcp_metadata([replace(tensor, chunks=(replace(whole, archive_bytes=0),))], {})
    with pytest.raises(StorageError, match="leave a hole"):
        build_dcp_metadata([replace(tensor, chunks=(replace(whole, sizes=(3,)),))], {})


def test_a_rank_without_rows_adds_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(4, 2), "empty": torch.zeros(0, 3)})
    metadata = load_dcp_metadata((tmp_path / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorEntry)
    entries = {**metadata.state_dict_metadata, "w": replace(entry, chunks=(*entry.chunks, ((4, 0), (0, 2))))}
    size = (tmp_path / "__0_0.distcp").stat().st_size
    storage = {**metadata.storage_data, ("w", (4, 0)): BlobEntry("__0_0.distcp", size, 0)}
    (tmp_path / ".metadata").write_bytes(dump_dcp_metadata(DcpMetadata(entries, storage)))
    checkpoint = read_dcp(tmp_path)
    assert len(checkpoint.tensors["w"].chunks) == 2
    assert read_tensor(checkpoint, "empty").shape == (0, 3)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A shape and boxes that tile it, made by cutting at random: uneven, and no grid."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(boxes) - 1))
        offsets, sizes = boxes[at]
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        if not dims:
            continue
        dim = draw(st.sampled_from(dims))
        cut = draw(st.integers(1, sizes[dim] - 1))
        lower = (offsets, (*sizes[:dim], cut, *sizes[dim + 1 :]))
        upper_at = (*offsets[:dim], offsets[dim] + cut, *offsets[dim + 1 :])
        boxes[at : at + 1] = [lower, (upper_at, (*sizes[:dim], sizes[dim] - cut, *sizes[dim + 1 :]))]
    return shape, draw(st.permutations(boxes))


@given(tilings(), st.data())
@settings(max_examples=200, deadline=None)
def test_tilings_agree_with_counting_elements(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = tiling
    assert tiling_fault(shape, boxes) is None
    moved = data.draw(st.integers(0, len(boxes) - 1))
    sizes = boxes[moved][1]
    at = tuple(data.draw(st.integers(0, full - size)) for full, size in zip(shape, sizes, strict=True))
    boxes = [*boxes[:moved], (at, sizes), *boxes[moved + 1 :]]
    count = torch.zeros(shape)
    for box in boxes:
        count[slices(*box)] += 1
    assert (tiling_fault(shape, boxes) is None) == bool((count == 1).all())


def test_a_pinwheel_tiles_and_a_shifted_one_does_not() -> None:
    pinwheel: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert tiling_fault((3, 3), pinwheel) is None
    assert "overlap" in str(tiling_fault((3, 3), [*pinwheel[:4], ((0, 0), (1, 1))]))


def test_irregular_layouts_end_in_bounded_time() -> None:
    # Each chunk overlaps the next: no cut separates them, and comparing all pairs would take 10**10 steps.
    boxes: list[Box] = [((i, 0), (2, 1)) for i in range(100_000)]
    assert "too irregularly" in str(tiling_fault((200_000, 1), boxes))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_metadata_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    if not folder.exists():
        write_checkpoint(folder, {"w": torch.zeros(4, 2), "v": torch.zeros(3)}, ("o",))
        (folder / "good").write_bytes((folder / ".metadata").read_bytes())
    content = bytearray((folder / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(content)
    try:
        checkpoint = read_dcp(folder)
    except StorageError:
        return
    assert checkpoint.path == folder


@pytest.mark.skipif(PEERS is None, reason="MBX_PEER_CHECKPOINTS names no folder")
def test_peer_checkpoints_are_read_as_torch_reads_them() -> None:
    folders = sorted(path.parent for path in Path(str(PEERS)).rglob(".metadata"))
    assert folders, "MBX_PEER_CHECKPOINTS holds no .metadata"
    for folder in folders:
        checkpoint = read_dcp(folder)
        target = {
            n: torch.zeros(t.shape, dtype=getattr(torch, TORCH_NAMES[t.dtype])) for n, t in checkpoint.tensors.items()
        }
        torch_dcp.load(target, checkpoint_id=folder, no_dist=True)
        for name, tensor in target.items():
            assert raw(read_tensor(checkpoint, name)) == raw(tensor), f"{folder}: {name}"
        assert checkpoint.objects
        for file, start, length in checkpoint.objects.values():
            with (folder / file).open("rb") as opened:
                opened.seek(start)
                ours, theirs = (
                    torch.load(io.BytesIO(extra_state_archive())),
                    torch.load(io.BytesIO(opened.read(length))),
                )
            assert [(t.dtype, t.shape) for t in theirs] == [(t.dtype, t.shape) for t in ours]
        listed = checkpoint.tensors.values()
        again = load_dcp_metadata(build_dcp_metadata(listed, checkpoint.objects))
        assert again == load_dcp_metadata((folder / ".metadata").read_bytes())
