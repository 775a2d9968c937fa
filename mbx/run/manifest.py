"""`mbx_manifest.json`: where a checkpoint came from, and the CRC-32 of every byte of it.

Three lists cover the folder: `tensors` their chunks, `containers` all that stands between the chunks of a file
(headers, archive records, index entries), `files` every file without tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.checksums import crc32
from converters.engine.scaling import Scaled
from converters.errors import StorageError, spelt
from converters.mcore.keys import EMBEDDING, held_as
from converters.tensors import StoredTensor, nbytes_of
from mbx.formats.files import MANIFEST, MANIFEST_BYTES, SCALED, WAIVED_KEYS
from mbx.untrusted.names import is_inside
from mbx.untrusted.small_files import read_json
from mbx.version import __version__

if TYPE_CHECKING:
    from converters.rows.expr import Value
    from mbx.run.job import Job

_BLOCK = 1 << 20
_LISTS = ("tensors", "containers", "files")
#: Fills a buffer from a byte of a file, as `Source.read_into`.
Read = Callable[[str, int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk's raw data: `nbytes` from byte `start` of `file` (relative to the checkpoint's folder)."""

    file: str
    start: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says about bytes: chunks by tensor, (size, CRC of the rest) by weight file, CRC by side file."""

    tensors: Mapping[str, tuple[Span, ...]]
    containers: Mapping[str, tuple[int, int]]
    files: Mapping[str, int]


def gaps(spans: list[Span], size: int) -> Iterator[tuple[int, int]]:
    """(start, bytes) of what lies between the spans of one file of `size` bytes."""
    at = 0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > at:
            yield at, span.start - at
        at = max(at, span.start + span.nbytes)
    if size > at:
        yield at, size - at


def gap_crc(read: Read, file: str, spans: list[Span], size: int) -> int:
    """CRC-32 of everything in a file that is not in one of its spans."""
    crc, buffer = 0, bytearray(_BLOCK)
    for start, nbytes in gaps(spans, size):
        for at in range(start, start + nbytes, _BLOCK):
            view = memoryview(buffer)[: min(_BLOCK, start + nbytes - at)]
            read(file, at, view)
            crc = crc32(view, crc)
    return crc


def compose(
    job: Job,
    tensors: Mapping[str, tuple[Span, ...]],
    containers: Mapping[str, tuple[int, int]],
    files: Mapping[str, int],
) -> bytes:
    """The manifest's text for a finished job."""
    plan = job.plan
    vocab = plan.config.get("model.vocab_size")
    document: dict[str, Value] = {
        "mbx": __version__,
        "direction": plan.direction,
        "table": None if plan.table is None else {"name": plan.table.name, "sha256": plan.table.digest},
        "source": {"path": str(job.source), **job.origin},
        "layout": asdict(plan.layout),
        "vocab": {"size": vocab, "padded": _embedding_rows(job) or vocab},
        "dtype_changes": [[a, b, count] for (a, b), count in plan.dtype_changes.items()],
        "waived": {
            "missing": list(plan.ledger.waived_missing),
            "unused": list(plan.ledger.waived_unused),
            WAIVED_KEYS: sorted({*job.waived_keys, *(() if plan.table is None else plan.table.config.waived)}),
        },
        "dropped": list(plan.ledger.dropped),
        "beside": list(plan.ledger.beside),
        SCALED: sorted(name for (name, _), change in plan.updates.items() if isinstance(change, Scaled)),
        "notes": list(map(spelt, plan.notes)),
        "files": {name: f"{crc:08x}" for name, crc in files.items()},
        "containers": {name: [size, f"{crc:08x}"] for name, (size, crc) in containers.items()},
    }
    # One tensor a line: a large model has 10^5 chunks, and the indenting encoder is ten times slower.
    lines = []
    for name, tensor in job.tensors.items():
        chunks = [[span.file, span.start, span.nbytes, f"{span.crc32:08x}"] for span in tensors[name]]
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "chunks": chunks}
        lines.append(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(entry)}")
    head = json.dumps(document, indent=1, ensure_ascii=False).removesuffix("\n}")
    return (head + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n").encode()


def _embedding_rows(job: Job) -> int | None:
    """Rows of the embedding on the Megatron Core side, padding included."""
    sides = (job.tensors, job.plan.sources)
    return next((side[name].shape[0] for side in sides if (name := held_as(EMBEDDING, side)) in side), None)


def spans_of(
    tensor: StoredTensor, crcs: list[int], prefix: str, data_start: Callable[[StoredTensor, int], int]
) -> tuple[Span, ...]:
    """Spans of a written tensor; `data_start` gives the first data byte of its chunk of a given number."""
    return tuple(
        Span(prefix + chunk.file, data_start(tensor, number), nbytes_of(tensor.dtype, chunk.sizes), crc)
        for number, (chunk, crc) in enumerate(zip(tensor.chunks, crcs, strict=True))
    )


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint that mbx made; StorageError when there is none, or it is not valid."""
    path = folder / MANIFEST
    try:
        stored = read_json(path, MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(
            f"`{folder}` has no `{MANIFEST}`", hint="only checkpoints that mbx wrote can be checked"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(stored, dict) or any(not isinstance(stored.get(key), dict) for key in _LISTS):
        raise StorageError(f"`{path}` is damaged: it is not an object with {', '.join(_LISTS)}")
    try:
        tensors = {
            str(name): tuple(
                Span(_inside(file), _whole(start), _whole(nbytes), int(crc, 16))
                for file, start, nbytes, crc in entry["chunks"]
            )
            for name, entry in stored["tensors"].items()
        }
        sizes = stored["containers"].items()
        containers = {_inside(file): (_whole(size), int(crc, 16)) for file, (size, crc) in sizes}
        files = {_inside(file): int(crc, 16) for file, crc in stored["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"`{path}` is damaged: an entry cannot be read: {error}") from error
    for name, spans in tensors.items():
        for span in spans:
            if span.file not in containers:
                raise StorageError(f"`{path}` is damaged: a chunk of `{name}` has no place")
    return Manifest(tensors, containers, files)


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def _inside(file: str) -> str:
    if not isinstance(file, str) or not is_inside(file):
        raise ValueError(f"{file!r} is not a file in this folder")
    return file
