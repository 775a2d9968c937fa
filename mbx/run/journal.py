"""The journal of a run: which pieces of which plan are written, so that a killed run can go on.

It lies in `DST.partial/.mbx/`: `run.json` names the plan and the state of the source; each process appends to a
log of its own. One line a piece, written after the piece's bytes; each line ends with its own CRC-32, so that a
line cut short counts for nothing.

A killed process loses nothing it has written: the operating system keeps the pages. A crashed machine may have
lost pages, but not those before the last mark (`S`), which is set after the target files were flushed; which of
the two happened is told by the boot id in the log's first line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.engine.pieces import Cutting
from converters.engine.plan import Plan
from converters.errors import StorageError, UsageError
from converters.tensors import StoredTensor
from mbx.formats.files import os_failure
from mbx.untrusted.small_files import INDEX, read_json, read_small
from mbx.version import __version__

FOLDER = ".mbx"
_HEADER = "run.json"
_LOGS = "*.log"
_FORMAT = 1
#: Files of a journal, and those by which processes of one run meet, relative to the folder of work.
OWN = re.compile(r"\.mbx/(?:run\.(?:json|tmp)|[0-9a-f]{8,}[\w.-]*\.log|team-[\w.-]+)")
#: Of a log, which has a line a piece.
_MOST_BYTES = 1 << 30
#: Target files are flushed this often, so that a crashed machine loses no more work than this.
_MARK_EVERY_S = 30.0

#: File → size in bytes and time of last change in ns.
Stamps = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal belongs to: a plan, cut in one way, over source files in one state."""

    digest: str
    cutting: Cutting
    stamps: Stamps


def stamps(root: Path, tensors: Iterable[StoredTensor]) -> Stamps:
    """Size and time of last change of every file that holds one of `tensors`; links are followed."""
    found = {}
    for file in sorted({chunk.file for tensor in tensors for chunk in tensor.chunks}):
        try:
            state = (root / file).stat()
        except OSError as error:
            raise os_failure(error, f"cannot read `{root / file}`") from error
        found[file] = (state.st_size, state.st_mtime_ns)
    return found


def check_unchanged(root: Path, before: Stamps, now: Stamps, *, when: str) -> None:
    """StorageError that names the files whose size or time differs; `when` says between which moments."""
    changed = sorted(file for file in {*before, *now} if before.get(file) != now.get(file))
    if changed:
        raise StorageError(
            f"`{root / changed[0]}` changed {when}",
            hint="let what writes it finish, then run again with ‹overwrite›",
            details=changed,
        )


def plan_digest(plan: Plan, targets: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of everything that decides which bytes go where, the source's headers and mbx's release included."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    add(
        _FORMAT,
        __version__,
        plan.direction,
        plan.table and plan.table.digest,
        sorted(plan.config.items()),
        plan.layout,
    )
    for unit in plan.units:
        add(unit.row, unit.shift, len(unit.moves), [(e.tensor, e.index, e.fold) for e in unit.entries])
    for tensor in (*plan.sources.values(), *plan.stored_sources, *targets.values()):
        add(tensor.name, tensor.dtype, tensor.shape)
        for chunk in tensor.chunks:
            add(chunk.offsets, chunk.sizes, chunk.file, chunk.start)
    for name, whole in (*plan.encoded.items(), *plan.reencoded.items()):
        add(name, whole.codec)
    for place, update in plan.updates.items():
        add(place, update.identity())
    for name, choice in plan.selected.items():
        add(name, choice.identity())
    return digest.hexdigest()


def has_progress(partial: Path) -> bool:
    """Whether an interrupted run left finished pieces in `partial`."""
    return any(_read_log(path, trusted=True) for path in _logs(partial))


def read(partial: Path) -> tuple[Header, dict[int, tuple[int, ...]]] | None:
    """The journal's header and its finished pieces, by number with their CRCs; None where there is no journal.

    Raises StorageError for a header that is damaged.
    """
    path = partial / FOLDER / _HEADER
    if not path.is_file():
        return None
    try:
        stored = read_json(path, INDEX)
        cutting = Cutting(int(stored["piece_bytes"]), int(stored["whole_bytes"]))
        marks = {str(file): (int(size), int(when)) for file, (size, when) in stored["stamps"].items()}
        header = Header(str(stored["digest"]), cutting, marks)
    except (StorageError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"`{path}` is damaged: {error}", hint="start again with ‹overwrite›") from error
    return header, read_pieces(partial)


def read_pieces(partial: Path, *, trusted: bool = False) -> dict[int, tuple[int, ...]]:
    """Finished pieces of all logs; `trusted` takes lines behind the last mark whichever machine wrote them."""
    pieces: dict[int, tuple[int, ...]] = {}
    for path in _logs(partial):
        pieces.update(_read_log(path, trusted=trusted))
    return pieces


def check_resumable(found: Header, ours: Header, root: Path, partial: Path) -> None:
    """UsageError when the journal belongs to another plan, StorageError when the source changed since."""
    check_unchanged(root, found.stamps, ours.stamps, when="since the interrupted run")
    if found.digest != ours.digest:
        raise UsageError(
            f"`{partial}` was left by a run with another source or other options, or by another release of mbx",
            hint="repeat that command with ‹resume›, or start again with ‹overwrite›",
        )


def planned(partial: Path) -> frozenset[str] | None:
    """Names of the files that the run of a folder of work makes; None where nothing says so."""
    try:
        stored = read_json(partial / FOLDER / _HEADER, INDEX)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StorageError:  # damaged: nothing is known
        return None
    files = stored.get("files")
    return frozenset(map(str, files)) if isinstance(files, list) else None


def start(partial: Path, header: Header, files: Iterable[str]) -> None:
    """Write the journal's header and the names of the `files` to be made; StorageError when it cannot be."""
    stored = {
        "digest": header.digest,
        "piece_bytes": header.cutting.piece_bytes,
        "whole_bytes": header.cutting.whole_bytes,
        "stamps": header.stamps,
        "files": sorted(files),
    }
    folder = partial / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        # Renamed into place: a header is there whole or not at all.
        (folder / "run.tmp").write_text(json.dumps(stored), encoding="utf-8")
        os.replace(folder / "run.tmp", folder / _HEADER)
    except OSError as error:
        raise os_failure(error, f"cannot write in `{folder}`") from error


class Log:
    """One process's log. `done` may be called from any thread; `sync` flushes what the process wrote so far."""

    def __init__(self, partial: Path, name: str, sync: Callable[[], None] | None) -> None:
        self._path = partial / FOLDER / f"{name}.log"
        self._flush = sync
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._marked = time.monotonic()
        self._size = 0
        self.pieces = 0
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise os_failure(error, f"cannot create `{self._path}`") from error
        self._append(f"B {_boot_id()}")

    def done(self, number: int, crcs: Sequence[int]) -> None:
        """Note a piece whose bytes are written; once in a while this also flushes the files."""
        self._append(f"P {number} {','.join(f'{crc:x}' for crc in crcs)}")
        self.pieces += 1
        if self._flush is not None and time.monotonic() - self._marked > _MARK_EVERY_S:
            self._mark(self._flush)

    def _mark(self, flush: Callable[[], None]) -> None:
        if not self._flushing.acquire(blocking=False):
            return
        try:
            covered = self._size
            flush()
            self._append(f"S {covered}")
            os.fsync(self._fd)
            self._marked = time.monotonic()
        except OSError as error:
            raise os_failure(error, f"flushing `{self._path}`") from error
        finally:
            self._flushing.release()

    def _append(self, text: str) -> None:
        line = f"{text} {zlib.crc32(text.encode()):08x}\n".encode()
        try:
            with self._lock:
                if os.write(self._fd, line) != len(line):
                    raise StorageError(f"writing `{self._path}`: a line was cut short", hint="is the disk full?")
                self._size += len(line)
        except OSError as error:
            raise os_failure(error, f"writing `{self._path}`") from error

    def close(self) -> None:
        """Close the log."""
        os.close(self._fd)


def _logs(partial: Path) -> list[Path]:
    return sorted((partial / FOLDER).glob(_LOGS))


def _read_log(path: Path, *, trusted: bool) -> dict[int, tuple[int, ...]]:
    """Pieces in one log, up to its first damaged line."""
    try:
        lines = read_small(path, _MOST_BYTES).splitlines(keepends=True)
    except OSError as error:
        raise os_failure(error, f"cannot read `{path}`") from error
    pieces: list[tuple[int, int, tuple[int, ...]]] = []
    durable = at = 0
    for line in lines:
        text, _, check = line.rstrip(b"\n").rpartition(b" ")
        if not line.endswith(b"\n") or check != f"{zlib.crc32(text):08x}".encode():
            break
        kind, *fields = text.decode().split(" ")
        if kind == "B":
            trusted = trusted or fields[0] == _boot_id()
        elif kind == "S":
            durable = int(fields[0])
        else:
            crcs = tuple(int(crc, 16) for crc in fields[1].split(",") if crc)
            pieces.append((at, int(fields[0]), crcs))
        at += len(line)
    return {number: crcs for at, number, crcs in pieces if trusted or at < durable}


def _boot_id() -> str:
    """An id that changes when the machine restarts; one of its own for every process where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"process-{os.getpid()}-{time.time_ns()}"
