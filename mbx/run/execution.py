"""Carries a planned conversion out: stream, journal, check, commit; alone or as one of several processes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.engine.pieces import Cutting, Piece
from converters.engine.stream import Engine
from converters.errors import DeviceError, MbxError, StorageError
from mbx.formats import hf
from mbx.formats.files import FileSink, FileSource
from mbx.run import journal
from mbx.run.commit import PartialFolder, check_free_space, partial_path
from mbx.run.ranks import ALONE, Share, Team, World, shares
from mbx.run.side_files import (
    check_equal,
    check_padded,
    check_repeated,
    file_names,
    manifest_text,
    write_file,
    write_headers,
    write_side_files,
)

if TYPE_CHECKING:
    from mbx.run.job import Job

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run did; `bytes_resumed` of the result were there from an interrupted one."""

    target: Path
    seconds: float
    bytes_written: int
    bytes_resumed: int = 0


def run(job: Job, progress: Progress = lambda _: None, place: World = ALONE) -> Outcome:
    """Carry a job out; the target appears when all of it is written and flushed, and not before.

    As one of several processes (`place`, see `mbx.run.ranks.world`) writes a share of it; rank 0 finishes the
    target, and every process returns once it is there.
    """
    source = FileSource(job.source_root)
    try:
        return _Run(job, source, progress, place).lead() if place.rank == 0 else _follow(job, source, progress, place)
    finally:
        source.close()


class _Run:
    """A run as the process sees it that owns the target folder: the only one, or rank 0."""

    def __init__(self, job: Job, source: FileSource, progress: Progress, place: World) -> None:
        self.job, self.source, self.progress, self.place = job, source, progress, place
        self.started = time.monotonic()
        self.stamps = journal.stamps(job.source_root, job.plan.stored_sources)

    def lead(self) -> Outcome:
        job, options = self.job, self.job.options
        with PartialFolder(job.target, resume=options.resume, overwrite=options.overwrite) as folder:
            check_free_space(job.target, job.output_bytes)
            check_equal(job, self.source)
            check_padded(job, self.source)
            check_repeated(job, self.source)
            base = _base(job, folder.path)
            header, found = self._open_journal(folder)
            with _sink(job, base) as sink:
                write_headers(job, sink)
                engine = _engine(job, self.source, sink, header.cutting)
                resumed = engine.absorb(found)
                self.progress(resumed)
                rest = [piece for piece in engine.pieces if piece.number not in found]
                # Several processes may still be writing when this one fails: their folder is never removed.
                folder.keep = bool(found) or self.place.size > 1
                with _kept_on_failure(folder, job.target):
                    if self.place.size == 1:
                        _work(engine, rest, folder, sink, uuid.uuid4().hex, self.progress, job.options.sync)
                        self._finish(engine, sink, folder)
                        folder.commit(sync=options.sync)
                    else:
                        self._with_team(engine, rest, header, sink, folder)
        return Outcome(job.target, time.monotonic() - self.started, job.output_bytes, resumed)

    def _open_journal(self, folder: PartialFolder) -> tuple[journal.Header, dict[int, tuple[int, ...]]]:
        options = self.job.options
        digest = journal.plan_digest(self.job.plan, self.job.tensors)
        mine = Cutting.for_memory(options.max_memory, options.workers)
        recorded = journal.read(folder.path) if folder.resumed else None
        if recorded is None:
            header = journal.Header(digest, mine, self.stamps)
            journal.start(folder.path, header, file_names(self.job))
            return header, {}
        before, found = recorded
        folder.keep = True
        header = journal.Header(digest, before.cutting, self.stamps)
        journal.check_resumable(before, header, self.job.source_root, folder.path)
        if max(before.cutting.piece_bytes, before.cutting.whole_bytes) > max(options.max_memory, mine.whole_bytes):
            raise DeviceError(
                f"the interrupted run was cut for {before.cutting.whole_bytes >> 20} MiB; "
                f"‹max-memory› gives {options.max_memory >> 20} MiB",
                hint="resume with the ‹max-memory› of that run, or start again with ‹overwrite›",
            )
        _check_files(_base(self.job, folder.path), self.job.file_sizes, found)
        return header, found

    def _with_team(
        self,
        engine: Engine,
        rest: Sequence[Piece],
        header: journal.Header,
        sink: FileSink,
        folder: PartialFolder,
    ) -> None:
        with Team(folder.path, self.place) as team:
            team.gather(header.digest)
            before = {piece.number for piece in engine.pieces} - {piece.number for piece in rest}
            mine = team.start(shares(rest, self.place.size))
            own = _work(
                engine, _chosen(engine, mine), folder, sink, team.nonce, self.progress, self.job.options.sync, team
            )
            team.finish()
            team.wait_for_all()
            others = journal.read_pieces(folder.path, trusted=True)
            taken = engine.absorb({n: crcs for n, crcs in others.items() if n not in before and n not in own})
            self.progress(taken)
            self._finish(engine, sink, folder)
            folder.commit(sync=self.job.options.sync)

    def _finish(self, engine: Engine, sink: FileSink, folder: PartialFolder) -> None:
        """Everything behind the last piece: flush, look at the source once more, side files, index, manifest."""
        job = self.job
        crcs = engine.checksums()
        for file, start, data in job.placed.after(crcs):
            sink.write(file, start, memoryview(data))
        sink.close(sync=job.options.sync)
        try:
            now = journal.stamps(job.source_root, job.plan.stored_sources)
            journal.check_unchanged(job.source_root, self.stamps, now, when="while it was read")
        except MbxError:
            folder.keep = self.place.size > 1  # what was read belongs to no state of the source
            raise
        files = write_side_files(job, folder.path, self.source)
        write_file(folder.path / hf.MANIFEST, [manifest_text(job, sink, crcs, files)], sync=job.options.sync)


def _follow(job: Job, source: FileSource, progress: Progress, place: World) -> Outcome:
    """A run as ranks other than 0 see it: a share of the pieces, in files that rank 0 made."""
    started = time.monotonic()
    partial = partial_path(job.target)
    digest = journal.plan_digest(job.plan, job.tensors)
    with Team(partial, place) as team:
        mine = team.join(digest)
        recorded = journal.read(partial)
        if recorded is None:
            raise StorageError(f"`{partial}` has no journal", hint="do all processes see one file system?")
        with _sink(job, _base(job, partial)) as sink:
            engine = _engine(job, source, sink, recorded[0].cutting)
            _work(engine, _chosen(engine, mine), partial, sink, team.nonce, progress, job.options.sync, team)
            sink.close(sync=job.options.sync)
            team.finish()
            team.wait_for_commit()
    return Outcome(job.target, time.monotonic() - started, sum(p.nbytes for p in _chosen(engine, mine)))


def _work(
    engine: Engine,
    pieces: Collection[Piece],
    folder: PartialFolder | Path,
    sink: FileSink,
    name: str,
    progress: Progress,
    sync: bool,
    team: Team | None = None,
) -> set[int]:
    """Carry pieces out, noting each in a log of the given name; returns their numbers."""
    partial = folder if isinstance(folder, Path) else folder.path
    log = journal.Log(partial, name, sink.sync if sync else None)

    def done(number: int, crcs: Sequence[int]) -> None:
        log.done(number, crcs)
        if isinstance(folder, PartialFolder):
            folder.keep = True
        if team is not None:
            team.check()

    try:
        engine.work(pieces, progress, done)
    finally:
        log.close()
    return {piece.number for piece in pieces}


@contextmanager
def _kept_on_failure(folder: PartialFolder, target: Path) -> Iterator[None]:
    """Tell the user of a failed run what is kept of it."""
    try:
        yield
    except MbxError as error:
        if folder.keep:
            error.details = (*error.details, f"what is written stays in `{folder.path}`: ‹resume› goes on from there")
        raise


def _chosen(engine: Engine, share: Share) -> list[Piece]:
    return [engine.pieces[number] for first, stop in share for number in range(first, stop)]


def _base(job: Job, root: Path) -> Path:
    """Folder of the tensors' files inside the target's."""
    base = root / job.base
    base.mkdir(exist_ok=True)
    return base


def _engine(job: Job, source: FileSource, sink: FileSink, cutting: Cutting) -> Engine:
    return Engine(
        job.plan,
        job.tensors,
        source,
        sink,
        workers=job.options.workers,
        max_memory=job.options.max_memory,
        cutting=cutting,
    )


@contextmanager
def _sink(job: Job, base: Path) -> Iterator[FileSink]:
    sink = FileSink(base, job.file_sizes, job.placed.archive_dtypes())
    try:
        yield sink
    finally:
        sink.close(sync=False)


def _check_files(base: Path, sizes: Mapping[str, int], found: Mapping[int, Sequence[int]]) -> None:
    """The files an interrupted run wrote into are still what it left."""
    for file, size in sizes.items() if found else ():
        path = base / file
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise StorageError(
                f"`{path}` has {0 if actual is None else actual} bytes; the interrupted run left {size}",
                hint="start again with ‹overwrite›",
            )
