"""Carries a planned conversion out: stream, journal, check, commit; alone or as one of several processes."""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import CoverageError, DeviceError, MbxError, StorageError
from converters.pieces import Cutting, Piece
from converters.stream import Engine
from converters.tensors import StoredTensor
from mbx import manifest
from mbx.io import hf, journal, legacy_write, torch_dist
from mbx.io.archive import extra_state_archive
from mbx.io.commit import PartialFolder, check_free_space, partial_path, write_synced
from mbx.io.files import FileSink, FileSource, os_failure
from mbx.io.ranks import ALONE, Share, Team, World, shares

if TYPE_CHECKING:
    from mbx.convert import Job

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

    As one of several processes (`place`, see `mbx.io.ranks.world`) writes a share of it; rank 0 finishes the
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
        self.stamps = journal.stamps(job.source_root, _stored_sources(job))

    def lead(self) -> Outcome:
        job, options = self.job, self.job.options
        with PartialFolder(job.target, resume=options.resume, overwrite=options.overwrite) as folder:
            check_free_space(job.target, job.output_bytes)
            _check_equal(job, self.source)
            base = _base(job, folder.path)
            header, found = self._open_journal(folder)
            with _sink(job, base) as sink:
                _write_headers(job, sink)
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
            journal.start(folder.path, header)
            return header, {}
        before, found = recorded
        folder.keep = True
        header = journal.Header(digest, before.cutting, self.stamps)
        journal.check_resumable(before, header, self.job.source_root, folder.path)
        if max(before.cutting.piece_bytes, before.cutting.whole_bytes) > max(options.max_memory, mine.whole_bytes):
            raise DeviceError(
                f"the interrupted run was cut for {before.cutting.whole_bytes >> 20} MiB; "
                f"--max-memory gives {options.max_memory >> 20} MiB",
                hint="resume with the --max-memory of that run, or start again with --overwrite",
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
        if isinstance(job.placed, legacy_write.Placement):
            job.placed.write_frames(sink, crcs)
        sink.close(sync=job.options.sync)
        try:
            now = journal.stamps(job.source_root, _stored_sources(job))
            journal.check_unchanged(job.source_root, self.stamps, now, when="while it was read")
        except MbxError:
            folder.keep = self.place.size > 1  # what was read belongs to no state of the source
            raise
        files = _write_side_files(job, folder.path, self.source)
        _write(folder.path / hf.MANIFEST, _manifest(job, sink, crcs, files), sync=job.options.sync)


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
            error.details = (*error.details, f"what is written stays in `{folder.path}`: --resume goes on from there")
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
    dtypes = job.placed.archive_dtypes() if isinstance(job.placed, torch_dist.Placement) else {}
    sink = FileSink(base, dict(job.file_sizes), dtypes)
    try:
        yield sink
    finally:
        sink.close(sync=False)


def _stored_sources(job: Job) -> list[StoredTensor]:
    """Every tensor that is read, an encoded one by its parts."""
    plain = [tensor for name, tensor in job.plan.sources.items() if name not in job.plan.encoded]
    return plain + [part for whole in job.plan.encoded.values() for part in whole.parts.values()]


def _check_files(base: Path, sizes: Mapping[str, int], found: Mapping[int, Sequence[int]]) -> None:
    """The files an interrupted run wrote into are still what it left."""
    for file, size in sizes.items() if found else ():
        path = base / file
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise StorageError(
                f"`{path}` has {0 if actual is None else actual} bytes; the interrupted run left {size}",
                hint="start again with --overwrite",
            )


def _write_headers(job: Job, sink: FileSink) -> None:
    """What stands in the files beside tensors: safetensors headers, or the payloads of `_extra_state`."""
    if isinstance(job.placed, torch_dist.Placement):
        payload = memoryview(extra_state_archive())
        for file, start, _ in job.placed.objects.values():
            sink.write(file, start, payload)
    elif isinstance(job.placed, hf.Placement):
        for file, header in job.placed.headers.items():
            sink.write(file, 0, memoryview(header))


def _check_equal(job: Job, source: FileSource) -> None:
    """Tensors that the config declares tied must be: an untied head is never dropped."""
    block = 8 << 20
    for name, other in job.plan.equal:
        a, b = job.plan.sources[name], job.plan.sources[other]
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        left, right = bytearray(block), bytearray(block)
        for at in range(0, a.nbytes if same else 0, block):
            count = min(block, a.nbytes - at)
            for tensor, buffer in ((a, left), (b, right)):
                chunk = tensor.chunks[0]
                source.read_into(chunk.file, source.data_start(chunk) + at, memoryview(buffer)[:count])
            if left[:count] != right[:count]:
                same = False
                break
        if not same:
            raise CoverageError(
                f"`{name}` should repeat `{other}`, and does not",
                hint="config.json says they are tied: set `tie_word_embeddings` to false to keep both",
            )


def _write_side_files(job: Job, root: Path, source: FileSource) -> dict[str, int]:
    """Copy side files byte for byte and write generated ones; returns the CRC-32 of each."""
    contents: dict[str, bytes] = dict(job.texts)
    for name, origin in job.side_files.items():
        try:
            contents[name] = origin.read_bytes()
        except OSError as error:
            raise os_failure(error, f"cannot read `{origin}`") from error
    if job.plan.kept:
        kept = [job.plan.sources[name] for name in job.plan.kept]
        contents[f"{job.base}hf/{hf.KEPT}"] = hf.pack_kept(kept, source)
    for name, data in contents.items():
        _write(root / name, data, sync=job.options.sync)
    crcs = {name: zlib.crc32(data) for name, data in contents.items()}
    if job.sidecars is not None:
        made = []
        if isinstance(job.placed, torch_dist.Placement):
            torch_dist.write_index(root / job.base, job.placed, job.sidecars.common)
            made = [f"{job.base}{name}" for name in (".metadata", "common.pt", "metadata.json")]
        _write(root / torch_dist.TRACKER, str(job.sidecars.iteration).encode(), sync=job.options.sync)
        for name in (*made, torch_dist.TRACKER):
            data = (root / name).read_bytes()
            _write(root / name, data, sync=job.options.sync)
            crcs[name] = zlib.crc32(data)
    return crcs


def _write(path: Path, data: bytes, *, sync: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_failure(error, f"cannot create `{path.parent}`") from error
    if sync:
        write_synced(path, data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise os_failure(error, f"writing `{path}`") from error


def _manifest(job: Job, sink: FileSink, crcs: Mapping[str, list[int]], files: Mapping[str, int]) -> bytes:
    """The manifest, container bytes read back from what was written."""
    prefix = job.base
    tensors, in_file = {}, {file: list[manifest.Span]() for file in job.file_sizes}
    for name, tensor in job.tensors.items():
        tensors[name] = manifest.spans_of(tensor, crcs[name], prefix, lambda t, n: sink.data_start(t.chunks[n]))
        for span in tensors[name]:
            in_file[span.file.removeprefix(prefix)].append(span)
    back = FileSource(sink.root)
    try:
        containers = {
            prefix + file: (size, manifest.gap_crc(back.read_into, file, in_file[file], size))
            for file, size in job.file_sizes.items()
        }
    finally:
        back.close()
    return manifest.compose(job, tensors, containers, files)
