"""What `mbx verify integrity` notices: one bit anywhere, a cut file, a missing file, chunks exchanged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from converters.errors import StorageError
from converters.mcore.layout import Layout
from mbx.proof.integrity import Report, check
from mbx.run.manifest import read
from tests.formats._runs import convert


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mcore` and `hf`: the tiny Llama converted both ways."""
    work = tmp_path_factory.mktemp("made")
    convert("hf-to-mcore", tiny / "llama", work / "mcore", layout=Layout(tp=2))
    convert("mcore-to-hf", work / "mcore", work / "hf")
    return work


@pytest.fixture(params=["mcore", "hf"])
def folder(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """A private copy of one of them."""
    return Path(shutil.copytree(made / request.param, tmp_path / "copy"))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_an_untouched_checkpoint_passes_and_every_byte_is_listed(folder: Path) -> None:
    report = check(folder, workers=3)
    assert report.passed and not report.unlisted
    assert report.num_tensors == len(read(folder).tensors)
    listed = read(folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "mbx_manifest.json":
            assert str(path.relative_to(folder)) in {**listed.files, **listed.containers}


def test_one_flipped_bit_anywhere_is_found_and_named(folder: Path) -> None:
    """At 5 places of every file: in a chunk the tensor and its byte range, elsewhere the file."""
    listed = read(folder)
    found_in_tensors = found_elsewhere = 0
    for file in (*listed.files, *listed.containers):
        size = (folder / file).stat().st_size
        for at in {0, size // 3, size // 2, 3 * size // 4, size - 1}:
            owner = {
                name
                for name, spans in listed.tensors.items()
                for s in spans
                if s.file == file and s.start <= at < s.start + s.nbytes
            }
            _flip(folder / file, at)
            (change,) = check(folder).changes
            _flip(folder / file, at)
            assert change.file == file
            assert {change.tensor} == (owner or {None})
            if owner:
                assert change.start <= at < change.stop and change.tensor in change.line()
            found_in_tensors += bool(owner)
            found_elsewhere += not owner
    assert found_in_tensors > 5 and found_elsewhere > 5
    assert check(folder).passed


def test_a_cut_file_names_every_tensor_behind_the_cut(folder: Path) -> None:
    listed = read(folder)
    file = sorted(listed.containers)[0]
    size = (folder / file).stat().st_size
    os.truncate(folder / file, size // 2)
    behind = {
        n for n, spans in listed.tensors.items() for s in spans if s.file == file and s.start + s.nbytes > size // 2
    }
    report = check(folder)
    assert {change.tensor for change in report.changes} == {None, *behind}
    assert any(f"{size // 2} bytes; {size} were written" in change.what for change in report.changes)


def test_a_missing_file_is_named(folder: Path) -> None:
    for file in (sorted(read(folder).files)[0], sorted(read(folder).containers)[0]):
        (folder / file).unlink()
        changes = check(folder).changes
        assert any(change.file == file and change.what == "the file is gone" for change in changes)


def test_two_chunks_exchanged_are_named(folder: Path) -> None:
    spans = [(n, s) for n, spans in read(folder).tensors.items() for s in spans]
    n, a, m, b = next((n, a, m, b) for n, a in spans for m, b in spans if b.nbytes == a.nbytes and b.crc32 != a.crc32)
    first, second = bytearray((folder / a.file).read_bytes()), bytearray((folder / b.file).read_bytes())
    if a.file == b.file:
        second = first
    one, two = first[a.start : a.start + a.nbytes], second[b.start : b.start + b.nbytes]
    first[a.start : a.start + a.nbytes], second[b.start : b.start + b.nbytes] = two, one
    (folder / a.file).write_bytes(first)
    (folder / b.file).write_bytes(second)
    assert {change.tensor for change in check(folder).changes} == {n, m}


def test_files_beside_are_reported_and_no_failure(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    report = check(folder)
    assert report.passed and report.unlisted == ("notes.txt",)


def test_progress_counts_the_bytes_of_the_tensors(folder: Path) -> None:
    seen: list[int] = []
    report = check(folder, progress=seen.append)
    assert sum(seen) == sum(s.nbytes for spans in read(folder).tensors.values() for s in spans) < report.nbytes


def test_a_missing_or_damaged_manifest_is_an_error(folder: Path) -> None:
    path = folder / "mbx_manifest.json"
    text = path.read_text()
    good = json.loads(text)
    chunk = {"t": {"chunks": [["../x", 0, 1, "0"]]}}
    lost = {"t": {"chunks": [["nowhere", 0, 1, "0"]]}}
    damaged = [text[:-20], "[]", "{}", json.dumps({**good, "tensors": chunk}), json.dumps({**good, "tensors": lost})]
    for broken in damaged:
        path.write_text(broken)
        with pytest.raises(StorageError, match="mbx_manifest.json"):
            check(folder)
    path.unlink()
    with pytest.raises(StorageError, match="has no `mbx_manifest.json`") as caught:
        check(folder)
    assert caught.value.hint


def test_a_report_without_changes_passes_and_with_one_does_not(folder: Path) -> None:
    clean = check(folder)
    assert clean.passed and isinstance(clean, Report)
    _flip(folder / sorted(read(folder).containers)[0], 9)
    assert not check(folder).passed
