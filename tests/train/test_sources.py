"""Files of every shape give the same examples; what cannot be read is one error with its place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from converters.errors import MbxError, StorageError, UnsupportedError
from mbx.train.data.sources import open_sources

RECORDS = [{"text": "naïve\u2028line"}, {"text": "x" * 70_000}, {"text": "[1]"}]


def read(spec: object) -> list[object]:
    return [record for source in open_sources(str(spec)) for _, record in source.records()]


def lines(records: list[object]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def test_every_way_to_write_records(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "b.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS)))
    (tmp_path / "d.gz.renamed").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    write_table(Table.from_pylist(RECORDS), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == RECORDS, path
    (tmp_path / "d.gz.renamed").unlink()
    assert read(tmp_path) == 4 * RECORDS
    assert read(tmp_path / "[ab].json*") == 2 * RECORDS


def test_tables_do_not_show_their_nulls(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "weight": 1}]}]
    write_table(Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == rows


def test_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    (source,) = open_sources(str(tmp_path / "saved"))
    assert [record for _, record in source.records()] == RECORDS and len(source.digest()) == 64
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match="needs the library `datasets`") as caught:
        open_sources(str(tmp_path / "saved"))
    assert "[data]" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"a": 1}, {"a": ]', r"a\.json: record 2: not valid JSON"),
        ("a.json", b'[{"a": 1}', r"a\.json: record 1: not valid JSON: the array does not end"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}]', "behind the end of its array"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines([{"a": "x" * 5000}]), mtime=0)[:-20], "no whole gzip file"),
        ("a.parquet", b"PAR1 no more", "cannot be read as Parquet"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd rest", "compressed by zstd"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MbxError, match=words):
        read(tmp_path / name)


def test_paths_that_name_nothing_or_too_much(tmp_path: Path) -> None:
    for spec in (tmp_path / "no.jsonl", tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(StorageError):
            read(spec)
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.jsonl").write_bytes(lines(RECORDS))
    with pytest.raises(MbxError, match="several splits: test, train"):
        read(tmp_path)
    assert read(tmp_path / "train*") == RECORDS
