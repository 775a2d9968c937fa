"""What can go wrong with disks, files and paths: one clear error that names the file, and no target."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.errors import CoverageError, DeviceError, MbxError, StorageError, UsageError
from converters.mcore.layout import Layout
from mbx.run import execution
from mbx.run.commit import partial_path
from tests.formats._runs import convert, in_child, tree

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny Llama."""
    return Path(shutil.copytree(tiny / "llama", tmp_path / "source"))


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small file systems; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"tmpfs{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def _refused(kind: type[MbxError], match: str, source: Path, target: Path, **options: Any) -> MbxError:
    """Convert; it must fail with `kind`, in words that match, and leave nothing under the target's name."""
    with pytest.raises(kind, match=match) as caught:
        convert("hf-to-mcore", source, target, **{"layout": Layout(tp=2), "sync": False, **options})
    assert caught.value.exit_code not in (0, 70)
    assert not target.exists() or not any(target.iterdir())
    assert not target.with_name(f".{target.name}.mbx-lock").exists()
    return caught.value


# --- the disk ---------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_written(source: Path, tmpfs: Callable[..., Path]) -> None:
    full = tmpfs("size=128k")
    error = _refused(DeviceError, "free; the result needs", source, full / "target")
    assert error.hint and not list(full.iterdir())


def test_a_disk_that_fills_up_on_the_way(
    source: Path, tmpfs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another program fills it: the work is kept, and goes on once there is room."""
    full = tmpfs("size=196k")
    monkeypatch.setattr(execution, "check_free_space", lambda target, nbytes: nbytes)
    error = _refused(DeviceError, "No space left on device", source, full / "target")
    assert "distcp" in error.fact and any("‹resume›" in detail for detail in error.details)
    subprocess.run(["mount", "-o", "remount,size=4m", str(full)], check=True)
    convert("hf-to-mcore", source, full / "target", layout=Layout(tp=2), resume=True)
    convert("hf-to-mcore", source, tmp_path / "plain", layout=Layout(tp=2))
    assert tree(full / "target") == tree(tmp_path / "plain")


def test_a_read_only_target(source: Path, tmpfs: Callable[..., Path]) -> None:
    _refused(StorageError, "cannot write beside .*Read-only file system", source, tmpfs("ro") / "target")


def _limited(source: Path, target: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    convert("hf-to-mcore", source, target)


def test_a_limit_on_file_sizes(source: Path, tmp_path: Path) -> None:
    status, text = in_child(partial(_limited, source, tmp_path / "target"))
    assert status != 0 and "DeviceError" in text and "distcp" in text and "File too large" in text
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("call", "number", "code", "words"),
    [
        ("preadv", 5, errno.EIO, "reading .*safetensors.*Input/output error"),
        ("pwrite", 20, errno.EIO, "writing .*distcp.*Input/output error"),
        ("pwrite", 20, errno.EDQUOT, "writing .*distcp.*quota"),
        ("fsync", 1, errno.EIO, "flushing .*distcp.*Input/output error"),
        ("ftruncate", 2, errno.EFBIG, "cannot create .*distcp.*File too large"),
        ("rename", 1, errno.EIO, "cannot name the finished folder"),
        ("replace", 1, errno.EROFS, "cannot write in .*Read-only"),
    ],
)
def test_a_system_call_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: int, words: str
) -> None:
    """A bad sector, a dead disk, a quota: at reading, writing, flushing and naming."""
    real, calls = getattr(os, call), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    target = tmp_path / "target"
    error = _refused(MbxError, words, source, target, sync=True)
    assert error.exit_code == (5 if code in (errno.EDQUOT, errno.EFBIG) else 4)
    monkeypatch.undo()
    convert("hf-to-mcore", source, target, resume=True, layout=Layout(tp=2))
    assert target.is_dir() and not partial_path(target).exists()


def test_short_reads_and_writes_are_no_errors(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may move fewer bytes than were asked for."""
    convert("hf-to-mcore", source, tmp_path / "plain")
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][: 1 + len(buffers[0]) // 3]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: 1 + len(data) // 3], at))
    convert("hf-to-mcore", source, tmp_path / "short")
    assert tree(tmp_path / "plain") == tree(tmp_path / "short")


# --- the source -------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _store(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def _first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard(source: Path, tmp_path: Path, keep: int) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[:keep])
    _refused(StorageError, SHARD, source, tmp_path / "target")


def test_a_missing_shard(source: Path, tmp_path: Path) -> None:
    (source / SHARD).unlink()
    _refused(StorageError, SHARD, source, tmp_path / "target")


def test_an_index_that_names_a_tensor_no_shard_has(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.layers.0.ghost.weight"] = SHARD
    (source / INDEX).write_text(json.dumps(index))
    _refused(StorageError, "model.layers.0.ghost.weight", source, tmp_path / "target")


def test_a_tensor_that_the_index_does_not_name(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    name = next(name for name, shard in index["weight_map"].items() if shard == SHARD)
    del index["weight_map"][name]
    (source / INDEX).write_text(json.dumps(index))
    _refused(StorageError, name.replace(".", r"\."), source, tmp_path / "target")


def test_a_tensor_that_the_table_does_not_know(source: Path, tmp_path: Path) -> None:
    header, data = _header(source / SHARD)
    header["model.layers.0.ghost.weight"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    _store(source / SHARD, header, data + b"abc")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.layers.0.ghost.weight"] = SHARD
    (source / INDEX).write_text(json.dumps(index))
    error = _refused(CoverageError, "model.layers.0.ghost.weight|unused|left", source, tmp_path / "target")
    assert "model.layers.0.ghost.weight" in " ".join((error.fact, *error.details))


@pytest.mark.parametrize("shift", [-2, 2, 10**15, -(10**15)])
def test_offsets_that_overlap_or_point_outside(source: Path, tmp_path: Path, shift: int) -> None:
    header, data = _header(source / SHARD)
    name = _first(header)
    header[name]["data_offsets"] = [at + shift for at in header[name]["data_offsets"]]
    _store(source / SHARD, header, data)
    error = _refused(StorageError, SHARD, source, tmp_path / "target")
    assert "tensor" in error.fact


def test_a_header_of_more_than_100_mb_is_not_read(source: Path, tmp_path: Path) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes((10**8 + 1).to_bytes(8, "little") + data[8:])
    _refused(StorageError, f"{SHARD}.*100000000 are allowed", source, tmp_path / "target")


def test_duplicate_keys(source: Path, tmp_path: Path) -> None:
    header, data = _header(source / SHARD)
    name = _first(header)
    text = json.dumps(header)
    twice = "{" + f"{json.dumps(name)}: {json.dumps(header[name])}, " + text[1:]
    _store(source / SHARD, twice, data)
    _refused(StorageError, f"{SHARD}.*{name}.*twice", source, tmp_path / "target")


def test_a_git_lfs_pointer(source: Path, tmp_path: Path) -> None:
    (source / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _refused(StorageError, SHARD, source, tmp_path / "target")


def test_a_folder_of_links_as_the_hub_cache_has(source: Path, tmp_path: Path) -> None:
    """Links are followed, broken ones are errors."""
    blobs, links = tmp_path / "blobs", tmp_path / "links"
    blobs.mkdir()
    links.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(number))
        (links / path.name).symlink_to(Path("..") / "blobs" / str(number))
    convert("hf-to-mcore", links, tmp_path / "linked", sync=False)
    convert("hf-to-mcore", source, tmp_path / "plain", sync=False)
    linked, plain = tree(tmp_path / "linked"), tree(tmp_path / "plain")
    weights = [name for name in plain if name.endswith(".distcp")]
    assert weights and all(linked[name] == plain[name] for name in weights)
    (blobs / str([p.name for p in sorted(source.iterdir())].index(SHARD))).unlink()
    _refused(StorageError, SHARD, links, tmp_path / "target")


# --- a Megatron checkpoint ----------------------------------------------------------------------------------------


@pytest.fixture
def mcore(source: Path, tmp_path: Path) -> Path:
    """The tiny Llama as a torch_dist checkpoint."""
    convert("hf-to-mcore", source, tmp_path / "mcore", layout=Layout(tp=2), sync=False)
    return tmp_path / "mcore"


def _export_refused(match: str, mcore: Path, target: Path) -> MbxError:
    with pytest.raises(StorageError, match=match) as caught:
        convert("mcore-to-hf", mcore, target, sync=False)
    assert not target.exists()
    return caught.value


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "hf/config.json"])
def test_a_missing_or_empty_or_damaged_file_of_a_checkpoint(mcore: Path, tmp_path: Path, name: str) -> None:
    path = mcore / "iter_0000000" / name
    data = path.read_bytes()
    for content in (None, b"", data[: len(data) // 2], b"\x80\x04." + bytes(50)):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        if name in ("common.pt", "hf/config.json"):
            try:  # not needed where the rest says all there is to know
                convert("mcore-to-hf", mcore, tmp_path / "target", sync=False)
            except MbxError as error:
                assert error.exit_code in (2, 3, 4)
            else:
                shutil.rmtree(tmp_path / "target")
        else:
            _export_refused(name.replace(".", r"\."), mcore, tmp_path / "target")


def test_an_archive_that_is_not_where_the_index_says(mcore: Path, tmp_path: Path) -> None:
    path = mcore / "iter_0000000" / "__1_0.distcp"
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    path.write_bytes(np.roll(data, 64).tobytes())
    _export_refused("__1_0.distcp", mcore, tmp_path / "target")


def test_values_beyond_fp16_are_refused_not_made_infinite(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    convert("hf-to-mcore", source, tmp_path / "fits", dtype="fp16")
    tensors = load_file(source / SHARD)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][3, 4] = 1e6
    save_file(tensors, source / SHARD, {"format": "pt"})
    _refused(
        UsageError, r"linear_fc2\.weight`: 1 value\(s\) are beyond fp16", source, tmp_path / "target", dtype="fp16"
    )
    convert("hf-to-mcore", source, tmp_path / "bf16", dtype="bf16")


# --- paths --------------------------------------------------------------------------------------------------------


def test_paths_that_lie_inside_one_another(source: Path, tmp_path: Path) -> None:
    for target in (source, source / "inside", source / "a" / "b", tmp_path):
        before = tree(tmp_path)
        with pytest.raises(UsageError, match="inside one another"):
            convert("hf-to-mcore", source, target, overwrite=True)
        assert tree(tmp_path) == before
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="inside one another"):
        convert("hf-to-mcore", source, tmp_path / "link" / "inside")


def test_a_target_that_is_a_file_or_not_empty(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        convert("hf-to-mcore", source, tmp_path / "file", overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        convert("hf-to-mcore", source, tmp_path / "full")
    assert tree(tmp_path / "full")
    with pytest.raises(StorageError, match="File exists|Not a directory"):
        convert("hf-to-mcore", source, tmp_path / "file" / "below")


def test_a_target_that_is_a_link_is_made_where_it_points(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    convert("hf-to-mcore", source, tmp_path / "link", sync=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "mbx_manifest.json").is_file()


def test_nothing_is_wrong_with_the_sound_source(source: Path, tmp_path: Path) -> None:
    """Negative control of this file: what every test here breaks does convert."""
    convert("hf-to-mcore", source, tmp_path / "target", layout=Layout(tp=2), sync=False)
    convert("mcore-to-hf", tmp_path / "target", tmp_path / "back", sync=False)
    assert tree(source) == {k: v for k, v in tree(tmp_path / "back").items() if k != "mbx_manifest.json"}
