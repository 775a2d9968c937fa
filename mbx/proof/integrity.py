"""`mbx verify integrity`: re-reads a checkpoint that mbx wrote, every byte of it, and names what changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.checksums import combine, crc32
from converters.engine.threads import run_threads
from converters.errors import StorageError
from mbx.formats.files import MANIFEST, FileSource
from mbx.run import manifest
from mbx.run.manifest import Manifest, Span

_BLOCK = 4 << 20
#: Bytes read at once: they are summed in a core's own cache.
_SLICE = 1 << 18


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes `[start, stop)` of `file` are not those that were written; of `tensor`, where they are one's."""

    file: str
    start: int
    stop: int
    tensor: str | None
    what: str

    def line(self) -> str:
        """The change in one line."""
        where = f"`{self.file}`" if self.stop <= self.start else f"`{self.file}` bytes {self.start} to {self.stop}"
        return f"{where}: {self.what}" + (f" (`{self.tensor}`)" if self.tensor is not None else "")


@dataclass(frozen=True, slots=True)
class Report:
    """What a check read and found; `unlisted` are files that the manifest does not speak of."""

    num_tensors: int
    num_files: int
    nbytes: int
    changes: tuple[Change, ...]
    unlisted: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.changes


def check(
    folder: Path,
    *,
    workers: int = 2,
    progress: Callable[[int], None] = lambda _: None,
    expect: Callable[[int], None] = lambda _: None,
) -> Report:
    """Re-read everything `mbx_manifest.json` lists in `folder`.

    `expect` is called once with the bytes of all tensors, `progress` with those that were read since it was called.
    Raises StorageError when there is no manifest, or it cannot be read; what differs is a change of the report.
    """
    listed = manifest.read(folder)
    if not listed.tensors:
        raise StorageError(f"`{folder / MANIFEST}` is damaged: it lists no tensor, so nothing would be checked")
    expect(sum(span.nbytes for spans in listed.tensors.values() for span in spans))
    source = FileSource(folder)
    try:
        checker = _Checker(folder, listed, source, progress)
        checker.run(workers)
    finally:
        source.close()
    known = {*listed.files, *listed.containers, MANIFEST}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    changes = tuple(sorted(checker.changes, key=lambda change: (change.file, change.start)))
    return Report(len(listed.tensors), len(known) - 1, checker.nbytes, changes, tuple(sorted(found - known)))


class _Checker:
    """Reads blocks in parallel and compares chunk by chunk."""

    def __init__(self, folder: Path, listed: Manifest, source: FileSource, progress: Callable[[int], None]) -> None:
        self.folder, self.listed, self.source, self.progress = folder, listed, source, progress
        self.changes: list[Change] = []
        self.nbytes = 0
        self._spans: dict[str, list[Span]] = {file: [] for file in listed.containers}
        self._crcs: dict[Span, dict[int, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def run(self, workers: int) -> None:
        """Check sizes, then chunks, then what stands between them, then the other files."""
        sizes = {file: self._size(file) for file in (*self.listed.containers, *self.listed.files)}
        for file, (size, _) in self.listed.containers.items():
            if sizes[file] is None:
                self._add(Change(file, 0, 0, None, "the file is gone"))
            elif sizes[file] != size:
                self._add(Change(file, 0, 0, None, f"{sizes[file]} bytes; {size} were written"))
        whole: list[tuple[str, Span]] = []
        for name, spans in self.listed.tensors.items():
            for span in spans:
                self._spans[span.file].append(span)
                if span.start + span.nbytes > (sizes[span.file] or 0):
                    self._add(Change(span.file, span.start, span.start + span.nbytes, name, "the bytes are gone"))
                else:
                    whole.append((name, span))
        self._read_all(self._blocks(whole), workers)
        for name, span in whole:
            self._compare(name, span)
        for file, (size, crc) in self.listed.containers.items():
            if sizes[file] is None or sizes[file] != size:
                continue
            if manifest.gap_crc(self.source.read_into, file, self._spans[file], size) != crc:
                self._add(Change(file, 0, 0, None, "the bytes around its tensors (header, index) differ"))
        for file, crc in self.listed.files.items():
            there = sizes[file]
            if there is None:
                self._add(Change(file, 0, 0, None, "the file is gone"))
            elif manifest.gap_crc(self.source.read_into, file, [], there) != crc:
                self._add(Change(file, 0, there, None, "the content differs"))
            self.nbytes += there or 0

    def _size(self, file: str) -> int | None:
        path = self.folder / file
        return path.stat().st_size if path.is_file() else None

    def _add(self, change: Change) -> None:
        with self._lock:
            self.changes.append(change)

    @staticmethod
    def _blocks(spans: list[tuple[str, Span]]) -> Iterator[tuple[Span, int, int]]:
        """(chunk, byte within it, bytes) in the order of the files, so that a disk reads ahead."""
        for _, span in sorted(spans, key=lambda item: (item[1].file, item[1].start)):
            for at in range(0, span.nbytes, _BLOCK):
                yield span, at, min(_BLOCK, span.nbytes - at)

    def _read_all(self, blocks: Iterator[tuple[Span, int, int]], workers: int) -> None:
        def work(stop: threading.Event) -> None:
            buffer = memoryview(bytearray(_SLICE))
            while not stop.is_set():
                with self._lock:
                    block = next(blocks, None)
                if block is None:
                    return
                span, at, count = block
                crc = 0
                try:
                    for first in range(at, at + count, _SLICE):
                        part = buffer[: min(_SLICE, at + count - first)]
                        self.source.read_into(span.file, span.start + first, part)
                        crc = crc32(part, crc)
                except StorageError as error:  # a disk error is one more difference; the rest is still read
                    self._add(Change(span.file, span.start + at, span.start + at + count, None, error.fact))
                    continue
                with self._lock:
                    self._crcs.setdefault(span, {})[at] = (crc, count)
                    self.nbytes += count
                self.progress(count)

        run_threads(work, max(1, workers), "mbx-check", torch_too=False)

    def _compare(self, name: str, span: Span) -> None:
        whole = read = 0
        for _, (crc, count) in sorted(self._crcs.get(span, {}).items()):
            whole, read = combine(whole, crc, count), read + count
        if read != span.nbytes or whole != span.crc32:
            what = "the bytes differ" if read == span.nbytes else "not all bytes could be read"
            self._add(Change(span.file, span.start, span.start + span.nbytes, name, what))
