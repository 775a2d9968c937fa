"""safetensors headers and folders, with the safetensors library as the oracle."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converters.errors import StorageError
from converters.tensors import Chunk, StoredTensor, nbytes_of
from mbx.formats.safetensors import MAX_HEADER_BYTES, build_header, read_header
from mbx.formats.safetensors_folder import read_folder


def whole(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, (Chunk((0,) * len(shape), shape, "", 0),))


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def shard(folder: Path, name: str, *tensors: str) -> None:
    save_file({t: torch.full((2,), float(i)) for i, t in enumerate(tensors)}, folder / name)


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4).bfloat16(),
        "a": torch.arange(5),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert read.metadata == {"format": "pt"}
    assert read.header_bytes == raw[: read.data_start]
    assert read.tensors.keys() == tensors.keys()
    for name, (_, shape, start, end) in read.tensors.items():
        assert shape == tuple(tensors[name].shape)
        held = raw[read.data_start + start : read.data_start + end]
        assert held == tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_header_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 3), "é": torch.zeros(5)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_header(tmp_path / "x.safetensors")
    again = build_header((whole(n, e[0], e[1]) for n, e in read.tensors.items()), read.metadata)
    assert again == read.header_bytes


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_built_header_reads_back_here_and_in_the_library(
    tmp_path_factory: pytest.TempPathFactory, listed: dict[str, tuple[str, list[int]]]
) -> None:
    tensors = [whole(name, dtype, tuple(shape)) for name, (dtype, shape) in listed.items()]
    header = build_header(tensors)
    assert len(header) % 8 == 0
    path = tmp_path_factory.mktemp("built") / "x.safetensors"
    path.write_bytes(header + bytes(sum(t.nbytes for t in tensors)))
    read = read_header(path)
    assert [(n, e[0], e[1]) for n, e in read.tensors.items()] == [(t.name, t.dtype, t.shape) for t in tensors]
    assert {n: tuple(t.shape) for n, t in load_file(path).items()} == {t.name: t.shape for t in tensors}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "expected a JSON object"),
        (b'{"a":1}', b"", "tensor 'a' must have exactly"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b'{"\\ud800":1}', b"", "not valid Unicode"),
        (
            json.dumps({"a": entry(0, 1)})[:-1].encode() + b',"a":' + json.dumps(entry(0, 1)).encode() + b"}",
            b"x",
            "tw",
        ),
        ({"__metadata__": {"k": 1}}, b"", "must be a string"),
        ({"a": entry(0, 4, "F12")}, b"1234", "unknown dtype 'F12'"),
        ({"a": entry(0, 4, "F32", [-1])}, b"1234", "sizes of 0 and above"),
        ({"a": entry(0, 4, "F32", [True])}, b"1234", "sizes of 0 and above"),  # type: ignore[list-item]
        ({"a": entry(0, 4, "F32", [2])}, b"1234", "needs 8 bytes"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", "'b' at 1 overlaps"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", "'b' at 3 leaves a hole"),
        ({"a": entry(1, 2)}, b"12", "leaves a hole"),
        ({"a": entry(0, 4)}, b"123", "cut short: tensor 'a'"),
        ({"a": entry(0, 4)}, b"12345", "1 bytes behind the last tensor"),
    ],
)
def test_refuses_a_bad_header(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(StorageError, match="x.safetensors") as caught:
        read_header(path)
    assert message in caught.value.fact


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, 2**63, 1000])
def test_a_huge_or_absent_header_is_not_allocated(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    with pytest.raises(StorageError, match="header"):
        read_header(path)


def test_an_absent_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match="an empty file"):
        read_header(tmp_path / "x.safetensors")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    good = build_header([whole("a", "F32", (2, 3)), whole("b", "U8", (4,))], {"format": "pt"}) + bytes(28)
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))
    try:
        read = read_header(path)
    except StorageError:
        return
    assert sum(end - start for _, _, start, end in read.tensors.values()) == path.stat().st_size - read.data_start


def test_a_folder_of_one_file(tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", "a", "b")
    shard(tmp_path, "adapter_model.safetensors", "other")
    read = read_folder(tmp_path)
    assert read.files == ("model.safetensors",)
    assert read.tensors.keys() == {"a", "b"}
    chunk = read.tensors["b"].chunks[0]
    raw = (tmp_path / chunk.file).read_bytes()
    assert raw[chunk.start : chunk.start + nbytes_of("F32", (2,))] == torch.ones(2).numpy().tobytes()


def test_a_folder_with_an_index_reads_its_shards_only(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shard(blobs, "one", "a")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "m-1.safetensors").symlink_to(blobs / "one")
    shard(folder, "m-2.safetensors", "b")
    shard(folder, "consolidated.safetensors", "a", "b")
    index(folder, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    read = read_folder(folder)
    assert read.files == ("m-1.safetensors", "m-2.safetensors")
    assert read.tensors["a"].chunks[0].file == "m-1.safetensors"


def test_shards_without_an_index(tmp_path: Path) -> None:
    shard(tmp_path, "model-00001-of-00002.safetensors", "a")
    with pytest.raises(StorageError, match="1 of 2 shards are missing: model-00002-of-00002"):
        read_folder(tmp_path)
    shard(tmp_path, "model-00002-of-00002.safetensors", "b")
    assert read_folder(tmp_path).tensors.keys() == {"a", "b"}
    shard(tmp_path, "model-00002-of-00002.safetensors", "a", "b")
    with pytest.raises(StorageError, match="1 tensors are in two shards: a"):
        read_folder(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a", "ghost")
    shard(tmp_path, "m-2.safetensors", "b")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-1.safetensors", "lost": "m-2.safetensors"})
    with pytest.raises(StorageError, match="3 tensors do not agree") as caught:
        read_folder(tmp_path)
    assert [line.split(":")[0] for line in caught.value.details] == ["b", "lost", "ghost"]
    index(tmp_path, {"a": "m-9.safetensors"})
    with pytest.raises(StorageError, match="shards are missing: m-9.safetensors"):
        read_folder(tmp_path)
    index(tmp_path, {"a": "../m-1.safetensors"})
    with pytest.raises(StorageError, match="must name a file in this folder"):
        read_folder(tmp_path)
    shard(tmp_path, "model.safetensors", "a")
    index(tmp_path, {"a": "m-1.safetensors", "ghost": "m-1.safetensors", "b": "m-2.safetensors"})
    with pytest.raises(StorageError, match="both model.safetensors and"):
        read_folder(tmp_path)


def test_the_index_decides_between_two_copies(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a", "b")
    shard(tmp_path, "overlay.safetensors", "b")
    index(tmp_path, {"a": "m-1.safetensors", "b": "overlay.safetensors"})
    read = read_folder(tmp_path)
    assert read.tensors["b"].chunks[0].file == "overlay.safetensors"
    assert read.passed_over == {"m-1.safetensors"}
    assert read.notes == ("`b`: the copy in m-1.safetensors is passed over",)


def test_an_index_of_another_cutting_is_passed_over_where_all_weights_are_there(tmp_path: Path) -> None:
    shard(tmp_path, "model-00001-of-00002.safetensors", "a")
    shard(tmp_path, "model-00002-of-00002.safetensors", "b")
    index(tmp_path, {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"})
    read = read_folder(tmp_path)
    assert read.tensors.keys() == {"a", "b"} and "another cutting" in read.notes[0]
    index(tmp_path, {"a": "model-00001-of-00003.safetensors", "c": "model-00003-of-00003.safetensors"})
    with pytest.raises(StorageError, match="2 of 2 shards are missing") as caught:
        read_folder(tmp_path)
    assert "hold 1 of its 2 tensors" in (caught.value.hint or "") and "hf download" in (caught.value.hint or "")


def test_an_index_whose_shards_became_one_file_is_passed_over(tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", "a", "b")
    index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert read_folder(tmp_path).files == ("model.safetensors",)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(StorageError, match="Git LFS pointer") as caught:
        read_folder(tmp_path)
    assert "git lfs pull" in (caught.value.hint or "")


def test_folders_without_weights_and_with_two_indexes(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(StorageError, match="no safetensors weights"):
        read_folder(tmp_path)
    write(tmp_path / "model.safetensors", {})
    with pytest.raises(StorageError, match="hold no tensors"):
        read_folder(tmp_path)
    index(tmp_path, {"a": "x"}, "one.safetensors.index.json")
    index(tmp_path, {"a": "x"}, "two.safetensors.index.json")
    with pytest.raises(StorageError, match="2 index files"):
        read_folder(tmp_path)


def test_build_header_refuses_a_repeated_name() -> None:
    with pytest.raises(StorageError, match="twice"):
        build_header([whole("a", "U8", (1,)), whole("a", "U8", (1,))])


def test_a_large_header_is_read_fast(tmp_path: Path) -> None:
    header = build_header(whole(f"model.layers.{i // 100}.experts.{i}.w", "BF16", (2, 3)) for i in range(100_000))
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(1_200_000))
    began = time.process_time()
    assert len(read_header(path).tensors) == 100_000
    assert time.process_time() - began < 3  # 0.6 s here; the margin is for slow machines
