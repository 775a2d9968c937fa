"""Files of records: JSON lines, JSON arrays, Parquet, text, each perhaps gzipped; read as streams.

What a path may be is decided here: a file, a folder, a pattern, a folder that `datasets` saved, the id of a data set.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from converters.errors import StorageError, UnsupportedError, UsageError
from mbx.extras import install_line
from mbx.untrusted.small_files import digest_of, open_regular

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
#: The longest record that is read, in bytes.
_MOST_RECORD = 256 << 20
_BLOCK = 1 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w.-]+)?(?::[\w.\[\]%-]+)?")
_SAVED = ("dataset_dict.json", "state.json")
_SPLITS = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val|dev|eval)(?:[^a-z]|$)", re.I)


@dataclass(frozen=True, slots=True)
class File:
    """One file of records."""

    path: Path

    @property
    def name(self) -> str:
        """What stands in front of a record's place."""
        return str(self.path)

    def records(self) -> Iterator[tuple[str, object]]:
        """Each record behind its place, as `:3` in `chat.jsonl:3`; what cannot be read is an error with its place."""
        try:
            with io.BufferedReader(io.FileIO(open_regular(self.path)), _BLOCK) as raw:
                if raw.peek(4)[:4] == b"PAR1":
                    yield from _parquet(self.path)
                    return
                packed = raw.peek(2)[:2] == b"\x1f\x8b"
                file: io.BufferedReader[Any] = io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK) if packed else raw
                yield from self._lines(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise StorageError(f"`{self.path}` is no whole gzip file: {error}") from error
        except OSError as error:
            raise StorageError(f"cannot read the data file `{self.path}`: {error.strerror or error}") from error

    def _lines(self, file: io.BufferedReader[Any]) -> Iterator[tuple[str, object]]:
        head = file.peek(_BLOCK)
        if head[:4] == b"\x28\xb5\x2f\xfd":
            raise UnsupportedError(f"`{self.path}` is compressed by zstd", hint="unpack it, or compress it by gzip")
        if self.path.name.removesuffix(".gz").endswith(".txt"):
            yield ":1", {"text": self._text(file.read(), 1).replace("\r\n", "\n").replace("\r", "\n")}
            return
        if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and self._is_array(head):
            yield from self._array(file)
            return
        number = 0
        while line := file.readline(_MOST_RECORD + 1):
            number += 1
            if len(line) > _MOST_RECORD:
                raise UsageError(f"{self.path}:{number}: a line of more than {_MOST_RECORD} bytes")
            text = self._text(line, number)
            if text.strip():
                yield f":{number}", _parsed(text, f"{self.path}:{number}")

    def _is_array(self, head: bytes) -> bool:
        """Whether the file is one array of records, not lines that are arrays by mistake."""
        return head.removeprefix(b"\xef\xbb\xbf").lstrip()[1:].lstrip()[:1] in (b"{", b"]")

    def _text(self, line: bytes, number: int) -> str:
        try:
            # -sig: without the mark that some editors put in front
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = number + error.object[: error.start].count(b"\n")
            raise StorageError(f"{self.path}:{at}: not UTF-8: {error.reason}") from error

    def _array(self, file: io.BufferedReader[Any]) -> Iterator[tuple[str, object]]:
        """Records of one JSON array, one in memory at a time."""
        reader = io.TextIOWrapper(file, "utf-8-sig")
        try:
            yield from self._elements(reader)
        except UnicodeDecodeError as error:
            raise StorageError(f"`{self.path}`: not UTF-8: {error.reason}") from error
        finally:
            reader.detach()

    def _elements(self, reader: io.TextIOWrapper) -> Iterator[tuple[str, object]]:
        decoder, text, number = json.JSONDecoder(), reader.read(_BLOCK).lstrip()[1:], 0
        while True:
            text = text.lstrip().removeprefix(",").lstrip() if number else text.lstrip()
            if text.startswith("]"):
                if (text[1:] + reader.read(_BLOCK)).strip():
                    raise UsageError(
                        f"`{self.path}` has more behind the end of its array", hint="write one record a line"
                    )
                return
            place, size = f": record {number + 1}", _BLOCK
            while True:
                try:
                    record, end = decoder.raw_decode(text)
                    if end < len(text):  # a number could go on
                        break
                except RecursionError as error:
                    raise UsageError(f"{self.path}{place}: not valid JSON: {error}") from error
                except ValueError as error:
                    wrong: ValueError | None = error
                else:
                    wrong = None
                more = reader.read(size) if len(text) <= _MOST_RECORD else ""
                if not more:
                    said = wrong or "the array does not end"
                    raise UsageError(f"{self.path}{place}: not valid JSON: {said}") from wrong
                text, size = text + more, 2 * size
            number += 1
            yield place, record
            text = text[end:]

    def digest(self) -> str:
        """SHA-256 of the file's bytes."""
        try:
            return digest_of(self.path)
        except OSError as error:
            raise StorageError(f"cannot read the data file `{self.path}`: {error.strerror}") from error


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not valid JSON: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UnsupportedError(f"`{path}` is Parquet, which needs pyarrow", hint=install_line("data")) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f": row {number}", _without_nulls(record)
    except (ArrowException, OSError) as error:
        raise StorageError(f"`{path}` cannot be read as Parquet: {error}") from error


def _without_nulls(value: Any) -> Any:
    """A table's value: every object in a column has all keys of any of them, those that it lacked as nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None or key == "content"}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Saved:
    """A data set that the `datasets` library reads: a folder it saved, or an id at the hub."""

    name: str
    rows: Any

    def records(self) -> Iterator[tuple[str, object]]:
        """As a file's."""
        for number, record in enumerate(self.rows, 1):
            yield f": row {number}", _without_nulls(record)

    def digest(self) -> str:
        """SHA-256 of its files' bytes, and of the rows that are chosen from them."""
        done = sha256(str(len(self.rows)).encode())
        for entry in self.rows.cache_files:
            done.update(File(Path(entry["filename"])).digest().encode())
        if (chosen := getattr(self.rows, "_indices", None)) is not None:
            done.update(str(chosen.column(0).to_pylist()).encode())
        return done.hexdigest()


def open_sources(*specs: str) -> list[File | Saved]:
    """What places of `data.path` name, in the order in which it is read; StorageError where there is nothing."""
    return [source for spec in specs for source in _sources_of(spec)]


def _sources_of(spec: str) -> list[File | Saved]:
    path = Path(spec)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return [_saved(path)]
        return [File(one) for one in _of_folder(path)]
    if path.exists():
        return [File(path)]
    if any(char in spec for char in "*?["):
        found = [Path(one) for one in sorted(glob.glob(spec, recursive=True)) if os.path.isfile(one)]
        if not found:
            raise StorageError(f"no file fits the pattern `{spec}`")
        return [File(one) for one in found]
    if _HUB_ID.fullmatch(spec) and not spec.removesuffix(".gz").endswith(_SUFFIXES):
        return [_of_hub(spec)]
    raise StorageError(f"cannot read the data file `{path}`: No such file or directory")


def _of_folder(folder: Path) -> list[Path]:
    found = sorted(
        one for one in folder.rglob("*") if one.is_file() and one.name.removesuffix(".gz").endswith(_SUFFIXES)
    )
    found = [one for one in found if not any(part.startswith(".") for part in one.relative_to(folder).parts)]
    found = [one for one in found if one.name not in ("dataset_info.json", "dataset_infos.json")]
    if not found:
        raise StorageError(f"the folder `{folder}` has no data files", hint=f"known: {', '.join(_SUFFIXES)}, also .gz")
    splits = {m[1].lower() for one in found if (m := _SPLITS.search(str(one.relative_to(folder))))}
    if len(splits) > 1:
        raise UsageError(
            f"the folder `{folder}` holds several splits: {', '.join(sorted(splits))}",
            hint=f"name one: data='{folder}/**/train*'",
        )
    return found


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            f"`{name}` needs the library `datasets`, which is not there", hint=install_line("data")
        ) from error
    return datasets


def _saved(folder: Path) -> Saved:
    library = _datasets(str(folder))
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # whatever its readers meet in the files
        raise StorageError(f"`datasets` cannot read `{folder}`: {type(error).__name__}: {error}") from error
    return Saved(str(folder), _split(found, str(folder), f"data={folder}/train"))


def _of_hub(spec: str) -> Saved:
    """`owner/name`, `owner/name@config`, either with `:split` behind it; the split is `train` otherwise."""
    library = _datasets(spec)
    name, _, split = spec.partition(":")
    name, _, config = name.partition("@")
    try:
        found = library.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # hub, network and readers each have their own
        said = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise StorageError(f"`{spec}` is no file here, and no data set that `datasets` can load: {said}") from error
    return Saved(spec, found)


def _split(found: Any, name: str, hint: str) -> Any:
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    raise UsageError(f"`{name}` holds several splits: {', '.join(found)}", hint=hint)
