"""torch.save archives, with torch and zipfile as the oracles."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import StorageError
from converters.tensors import nbytes_of
from mbx.torchfile.archive import (
    extra_state_archive,
    file_reader,
    load_archive,
    locate_tensor,
    object_archive,
    read_directory,
    read_object,
    tensor_archive,
)
from mbx.torchfile.torch_values import TORCH_DTYPES, Namespace, TensorStub
from mbx.torchfile.zip_format import MAX_U32, ZIP64_FROM, Read, data_offset

PEERS = os.environ.get("MBX_PEER_CHECKPOINTS")
needs_peers = pytest.mark.skipif(PEERS is None, reason="MBX_PEER_CHECKPOINTS names no folder")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def reader(data: bytes) -> Read:
    return lambda offset, length: data[offset : offset + length]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def framed(dtype: str, shape: tuple[int, ...], data: bytes, *, zip64: bool | None = None) -> bytes:
    frame = tensor_archive(dtype, shape, zip64=zip64)
    archive = frame.prefix + data + frame.suffix(zlib.crc32(data))
    assert len(archive) == frame.total_bytes
    assert len(frame.prefix) % 64 == 0
    return archive


@pytest.mark.parametrize("zip64", [None, True])
@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_torch_loads_a_framed_tensor_of_every_dtype(name: str, zip64: bool | None) -> None:
    shape = (3, 5)
    data = bytes(i % 2 for i in range(nbytes_of(TORCH_DTYPES[name], shape)))
    archive = framed(TORCH_DTYPES[name], shape, data, zip64=zip64)
    loaded = torch.load(io.BytesIO(archive), weights_only=True)
    assert (loaded.dtype, tuple(loaded.shape), raw(loaded)) == (getattr(torch, name), shape, data)
    assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None


@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(sorted(TORCH_DTYPES)), st.booleans())
@settings(max_examples=80, deadline=None)
def test_frames_of_any_shape_are_located_and_loaded(shape: list[int], name: str, zip64: bool) -> None:
    dtype, sizes = TORCH_DTYPES[name], tuple(shape)
    data = bytes(i % 2 for i in range(nbytes_of(dtype, sizes)))
    archive = framed(dtype, sizes, data, zip64=zip64)
    found = locate_tensor(reader(archive), len(archive))
    assert (found.dtype, found.shape, found.nbytes) == (dtype, sizes, len(data))
    assert archive[found.data_offset : found.data_offset + found.nbytes] == data
    loaded = torch.load(io.BytesIO(archive), weights_only=True)
    assert (tuple(loaded.shape), raw(loaded)) == (sizes, data)
    assert loaded.stride() == torch.empty(sizes).stride()


def test_a_wrong_checksum_is_seen() -> None:
    """The negative control of every testzip above."""
    frame = tensor_archive("U8", (4,))
    archive = frame.prefix + b"abcd" + frame.suffix(zlib.crc32(b"abce"))
    assert zipfile.ZipFile(io.BytesIO(archive)).testzip() == "archive/data/0"


def test_a_framed_tensor_can_be_mapped(tmp_path: Path) -> None:
    data = raw(torch.arange(6.0))
    (tmp_path / "t.pt").write_bytes(framed("F32", (6,), data))
    assert torch.load(tmp_path / "t.pt", mmap=True).tolist() == list(range(6))


def test_beyond_4_gib(tmp_path: Path) -> None:
    rows = (ZIP64_FROM >> 20) + 1
    frame = tensor_archive("U8", (rows, 1 << 20))
    assert tensor_archive("U8", (rows - 2, 1 << 20)).zip64 is False
    assert frame.zip64
    assert frame.data_nbytes + (1 << 20) > MAX_U32
    path = tmp_path / "big.pt"
    with path.open("wb") as file:  # sparse: takes no space
        file.write(frame.prefix)
        file.seek(frame.data_nbytes - 3, os.SEEK_CUR)
        file.write(b"end")
        file.write(frame.suffix(0))
    assert path.stat().st_size == frame.total_bytes
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == (rows, 1 << 20)
    assert bytes(loaded[-1, -3:].tolist()) == b"end"
    with path.open("rb") as file:
        found = locate_tensor(file_reader(file.fileno()), frame.total_bytes)
    assert (found.data_offset, found.nbytes) == (len(frame.prefix), frame.data_nbytes)
    info = zipfile.ZipFile(path).getinfo("archive/data/0")
    assert info.file_size == frame.data_nbytes


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_locates_what_torch_saved(name: str) -> None:
    whole = torch.arange(24).remainder(2).to(getattr(torch, name)).reshape(4, 6)
    for tensor in (whole, whole[1:3], whole[2, 3], whole[:0], whole[1:2].t().t()):
        archive = saved(tensor)
        found = locate_tensor(reader(archive), len(archive))
        assert (found.dtype, found.shape) == (TORCH_DTYPES[name], tuple(tensor.shape))
        assert archive[found.data_offset : found.data_offset + found.nbytes] == raw(tensor)


def test_a_tensor_that_is_not_row_major_is_refused() -> None:
    archive = saved(torch.zeros(2, 3).t())
    with pytest.raises(StorageError, match=r"strides \(1, 3\), not row-major"):
        locate_tensor(reader(archive), len(archive))
    archive = saved([torch.zeros(2)])
    with pytest.raises(StorageError, match="expected a tensor, got list"):
        locate_tensor(reader(archive), len(archive))


def test_whole_files(tmp_path: Path) -> None:
    weight, bias = torch.randn(3, 4).bfloat16(), torch.randn(4)
    args = argparse.Namespace(hidden_size=4, params_dtype=torch.bfloat16)
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"args": args, "model": {"w": weight, "b": bias, "tied": weight}}, path)
    loaded, storages = load_archive(path)
    assert isinstance(loaded, dict)
    assert isinstance(loaded["args"], Namespace)
    model = loaded["model"]
    data = path.read_bytes()
    for name, tensor in (("w", weight), ("b", bias)):
        stub = model[name]
        assert isinstance(stub, TensorStub)
        start, nbytes = storages[stub.storage]
        assert data[start : start + nbytes] == raw(tensor)
    assert model["tied"] == model["w"]
    with pytest.raises(StorageError, match="cannot be opened"):
        load_archive(tmp_path / "absent.pt")
    with pytest.raises(StorageError, match="cannot be read|not a valid|no zip directory"):
        load_archive(tmp_path)


def test_object_archives_are_loaded_by_torch(tmp_path: Path) -> None:
    value = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "x": [None, "é", 2**40, (1, b"\xff")]},
    }
    archive = object_archive(value)
    assert torch.load(io.BytesIO(archive), weights_only=True) == value
    assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
    assert read_object(reader(archive), len(archive)) == (value, {})
    args = argparse.Namespace(a=1, b=[2])
    loaded = torch.load(io.BytesIO(object_archive({"args": args})), weights_only=False)
    assert loaded == {"args": args}
    with pytest.raises(StorageError, match="tensors cannot be written"):
        object_archive([TensorStub("U8", (0,), "0", 0, (1,), 0)])


def test_extra_state_is_what_megatron_core_writes() -> None:
    (tensor,) = torch.load(io.BytesIO(extra_state_archive()), weights_only=True)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (0,))
    ours, _ = read_object(reader(extra_state_archive()), len(extra_state_archive()))
    theirs, _ = read_object(reader(saved([tensor])), len(saved([tensor])))
    assert ours == theirs


def test_directories_agree_with_zipfile() -> None:
    for archive in (saved({"a": torch.zeros(7), "b": torch.ones(2)}), framed("U8", (3,), b"abc", zip64=True)):
        listed = {e.name: e for e in read_directory(reader(archive), len(archive))}
        infos = zipfile.ZipFile(io.BytesIO(archive)).infolist()
        assert len(listed) == len(infos)
        for info in infos:
            entry = listed[info.filename]
            assert (entry.header_offset, entry.nbytes, entry.crc32) == (info.header_offset, info.file_size, info.CRC)
            start = data_offset(reader(archive), entry, len(archive))
            held = zipfile.ZipFile(io.BytesIO(archive)).read(info)
            assert archive[start : start + entry.nbytes] == held


def test_a_long_comment_is_stepped_over() -> None:
    buffer = io.BytesIO(saved(torch.zeros(2)))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"c" * 60_000
    data = buffer.getvalue()
    assert locate_tensor(reader(data), len(data)).shape == (2,)


def rewritten(change: str, content: bytes, *, compress: bool = False) -> bytes:
    """A saved tensor with one record replaced."""
    source, buffer = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(2)))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            target.writestr(info.filename, content if info.filename.endswith(change) else source.read(info))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "no zip directory"),
        (b"\x80\x02}q\x00.", "no zip directory"),
        (saved(torch.zeros(2))[:-5], "no zip directory"),
        (saved(torch.zeros(2))[100:], "no valid local header|lies outside|reaches past"),
        (rewritten("byteorder", b"big"), "not little-endian"),
        (rewritten("data/0", b"1234"), "needs 8 bytes of a storage that has 4"),
        (rewritten("x", b"", compress=True), "is compressed"),
    ],
)
def test_unsound_archives_are_refused(archive: bytes, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        locate_tensor(reader(archive), len(archive), source="w.pt")


def test_hostile_archives_run_nothing(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    attack = f"cos\nsystem\nX{chr(len(str(target)) + 6)}\0\0\0touch {target}\x85R.".encode()
    archive = rewritten("data.pkl", b"\x80\x02" + attack)
    with pytest.raises(StorageError, match=r"w\.pt: the pickle names 'os\.system'"):
        locate_tensor(reader(archive), len(archive), source="w.pt")
    assert not target.exists()


MUTABLE = [
    saved(torch.zeros(2, 3)),
    saved({"a": [torch.zeros(1), torch.ones(2).t()], "n": argparse.Namespace(x=1)}),
    framed("BF16", (2,), b"abcd", zip64=True),
    object_archive({"a": [1, 2.0, None]}),
]


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_a_mutated_archive_is_read_or_refused(data: st.DataObject) -> None:
    archive = bytearray(data.draw(st.sampled_from(MUTABLE)))
    ends = min(400, len(archive))  # half of the changes hit the directory, where lengths and offsets stand
    for _ in range(data.draw(st.integers(1, 5))):
        low = len(archive) - ends if data.draw(st.booleans()) else 0
        archive[data.draw(st.integers(low, len(archive) - 1))] = data.draw(st.integers(0, 255))
    mutated = bytes(archive)
    asked: list[int] = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        assert offset >= 0
        return mutated[offset : offset + length]

    for unknown in ("refuse", "opaque"):
        try:
            read_object(read, len(mutated), unknown=unknown)  # type: ignore[arg-type]
        except StorageError:
            continue
    assert max(asked) <= len(mutated)


@needs_peers
def test_peer_side_files_are_read_as_torch_reads_them() -> None:
    found = sorted(Path(str(PEERS)).rglob("common.pt"))
    assert found, "MBX_PEER_CHECKPOINTS holds no common.pt"
    for path in found:
        assert load_archive(path) == (torch.load(path, weights_only=False), {})


@needs_peers
def test_peer_legacy_checkpoints_are_read_as_torch_reads_them() -> None:
    found = sorted(Path(str(PEERS)).rglob("model_optim_rng.pt"))
    if not found:
        pytest.skip("the folder MBX_PEER_CHECKPOINTS holds no Megatron-LM checkpoint of the legacy format")
    for path in found:
        loaded, storages = load_archive(path, unknown="opaque")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Megatron Core, which torch imports for its enums
            expected = torch.load(path, weights_only=False, map_location="cpu")
        data = path.read_bytes()
        assert isinstance(loaded, dict)
        assert isinstance(loaded["args"], Namespace)
        assert loaded["args"].values.keys() == vars(expected["args"]).keys()
        assert loaded["args"].values["padded_vocab_size"] == expected["args"].padded_vocab_size
        assert loaded["model"].keys() == expected["model"].keys()
        for name, tensor in expected["model"].items():
            stub = loaded["model"][name]
            if tensor is None:  # an extra state without content
                assert stub is None
                continue
            assert stub.is_contiguous
            start = storages[stub.storage][0] + stub.storage_offset * stub.itemsize
            assert data[start : start + tensor.nbytes] == raw(tensor)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, mbx.torchfile.archive, mbx.torchfile.dcp, mbx.formats.safetensors; print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
