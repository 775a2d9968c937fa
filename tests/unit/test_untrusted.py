"""Small files and values of strangers: bounded in size, in time and in what they open."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from converters.errors import StorageError
from mbx.untrusted.names import leads_out
from mbx.untrusted.small_files import open_regular, read_json, read_small
from mbx.untrusted.values import check_bounded
from mbx.untrusted.yaml_files import read_yaml

pytestmark = pytest.mark.timeout(20)


def test_a_small_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    assert read_small(path, 8) == b"12345678"
    with pytest.raises(StorageError, match="has 8 bytes; at most 7 are read"):
        read_small(path, 7)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path("x")
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            listening.bind("x")
        elif kind == "device":
            path = Path("/dev/zero")
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(StorageError, match="no regular file"):
            read_small(path, 8)


def test_a_folder_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "\ud800", "{", "NaN", '{"a": ' * 5_000])
def test_json_that_is_no_object_is_an_error_of_its_own(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(StorageError):
        read_json(tmp_path / "x.json")


def doubled(times: int) -> list[object]:
    value: list[object] = [0]
    for _ in range(times):
        value = [value, value]
    return value


def test_values_that_share_their_parts_are_weighed_as_a_walk_meets_them() -> None:
    check_bounded(doubled(10), "x")
    with pytest.raises(StorageError, match="more than 1000000 values"):
        check_bounded(doubled(60), "x")
    with pytest.raises(StorageError, match="more than 1000000 values"):
        check_bounded({"a": {"b": tuple(doubled(25))}}, "x")


def test_values_without_an_end_are_refused() -> None:
    cycle: list[object] = []
    cycle.append({"more": cycle})
    with pytest.raises(StorageError, match="contains itself"):
        check_bounded(cycle, "x")
    deep: object = 0
    for _ in range(200):
        deep = {"a": deep}
    with pytest.raises(StorageError, match="nested deeper than 100"):
        check_bounded(deep, "x")


def test_yaml_shares_what_an_alias_names(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
        "a: &a [*a]\n",
        "a: " + "[" * 5_000,
        "a: !!python/object/apply:os.mkdir [ran]\n",
        "- a\n",
    ],
    ids=["aliases", "merges", "cycle", "deep", "tag", "list"],
)
def test_yaml_that_is_more_than_a_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(StorageError):
        read_yaml(tmp_path / "x.yaml")


def test_links_within_a_hub_cache_are_its_own(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "1").write_text("{}")
    (tmp_path / "secret").write_text("mine")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "tokenizer.json").symlink_to("../../../secret")
    (model / "blobs" / "2").symlink_to("../../secret")
    (snapshot / "vocab.json").symlink_to("../../blobs/2")
    assert not leads_out(snapshot / "config.json")
    assert leads_out(snapshot / "tokenizer.json")
    assert leads_out(snapshot / "vocab.json")
