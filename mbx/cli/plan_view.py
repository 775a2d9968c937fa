"""A planned conversion as a document with stable keys, and as lines for one screen."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.mcore.keys import EMBEDDING, bare, held_as
from mbx.cli.output import folded, paint
from mbx.text import human_bytes, human_memory, plural, wrapped

if TYPE_CHECKING:
    from converters.engine.plan import Plan
    from converters.tensors import StoredTensor
    from mbx.run.job import Job

_SHOWN_FILES = 4
_SHOWN_NOTES = 3
#: Bytes from which a speed says something of the disk; below, start-up counts most.
_SPEED_FROM = 10**8

Document = dict[str, Any]


def document(job: Job) -> Document:
    """Everything a dry run tells, from the job alone and the free space of the target's disk."""
    plan, ledger = job.plan, job.plan.ledger
    importing = job.sidecars is not None
    free = _free_bytes(job.target)
    size = plan.config.get("model.vocab_size")
    rows = next((draft.shape[0] for draft in plan.drafts if bare(draft.name) == EMBEDDING), None)
    if rows is None and (embedding := plan.sources.get(held_as(EMBEDDING, plan.sources))) is not None:
        rows = embedding.shape[0]
    needed = job.output_bytes  # made of every header beside the weights: DeepSeek-V3 keeps 45,000 scales
    return {
        "direction": plan.direction,
        "source": str(job.source),
        "target": str(job.target),
        "origin": dict(job.origin),
        "table": None if plan.table is None else {"name": plan.table.name, "sha256": plan.table.digest},
        "layout": asdict(plan.layout) if importing else None,
        "tensors": {"source": len(plan.sources) - len(plan.selected), "target": len(plan.drafts)},
        "bytes": {"source": plan.source_bytes, "target": plan.target_bytes, "on_disk": needed},
        "vocab": {"size": size, "padded": rows},
        "dtypes": {
            "source": _by_dtype((tensor.dtype, tensor.nbytes) for tensor in _stored(plan)),
            "target": _by_dtype((tensor.dtype, tensor.nbytes) for tensor in job.tensors.values()),
            "changes": [{"from": a, "to": b, "count": n} for (a, b), n in sorted(plan.dtype_changes.items())],
        },
        "files": _files(job, importing),
        "memory": {"max_bytes": job.options.max_memory, "workers": job.options.workers},
        "disk": {"free_bytes": free, "needed_bytes": needed, "fits": free >= needed},
        "ledger": {"source_tensors": ledger.consumed + len(ledger.waived_unused), **asdict(ledger)},
        "notes": list(plan.notes),
    }


def lines(doc: Document) -> list[str]:
    """The plan as text, at most a screen for a small model."""
    weights = [file for file in doc["files"] if file["kind"] == "weights"]
    copied = [Path(file["path"]) for file in doc["files"] if file["kind"] == "copied"]
    made = [Path(file["path"]).name for file in doc["files"] if file["kind"] == "made"]
    counts, sizes, disk = doc["tensors"], doc["bytes"], doc["disk"]
    parts = [
        ("from", [doc["source"]]),
        ("to", [doc["target"]]),
        ("table", [f"{doc['table']['name']} (sha256 {doc['table']['sha256'][:12]})"] if doc["table"] else []),
    ]
    if doc["layout"]:
        parts.append(("layout", [_layout(doc["layout"])]))
    parts += [
        ("tensors", [ledger_line(doc)]),
        ("bytes", [f"{human_bytes(sizes['source'])} in {plural(counts['source'], 'tensor')}"
                   f" → {human_bytes(sizes['target'])} in {plural(counts['target'], 'tensor')}"]),
        ("vocab", [_vocab(doc)] if doc["vocab"]["size"] is not None else []),
        ("dtypes", _dtype_lines(doc)),
        ("weights", _file_lines(weights)),
        ("made", wrapped(made, 12)),
        ("copied", _copied_lines(copied)),
        ("memory", [f"at most {human_memory(doc['memory']['max_bytes'])} of data in flight,"
                    f" {plural(doc['memory']['workers'], 'worker')}"]),
        ("disk", [f"{human_bytes(disk['needed_bytes'])} needed, {human_bytes(disk['free_bytes'])} free"
                  + ("" if disk["fits"] else ": " + paint("not enough", "red"))]),
        ("notes", _note_lines(doc)),
    ]  # fmt: skip
    return [paint(f"{doc['direction']}: dry run, nothing was written", "bold"), *_block(parts)]


def summary(doc: Document, result: Mapping[str, Any]) -> list[str]:
    """What a finished run did, in a few lines."""
    text = f"{plural(doc['tensors']['target'], 'tensor')}, {human_bytes(result['bytes'])}"
    if result["bytes_resumed"]:
        text += f", {human_bytes(result['bytes'] - result['bytes_resumed'])} of it now,"
    text += f" in {result['seconds']:.2f} s"
    if result["bytes"] >= _SPEED_FROM:
        text += f", {result['gb_per_s']:.2f} GB/s"
    parts = [
        ("written", [f"{text}, peak memory {human_memory(result['peak_memory_bytes'])}"]),
        ("tensors", [ledger_line(doc)]),
        ("dtypes", [_changes(doc)]),
        ("vocab", [_vocab(doc)] if doc["vocab"]["size"] not in (None, doc["vocab"]["padded"]) else []),
        ("notes", _note_lines(doc)),
        ("to", [paint(result["target"], "green")]),
    ]
    return _block(parts)


def ledger_line(doc: Document) -> str:
    """`291 of 291 source tensors consumed, 99 produced, 0 waived`."""
    ledger = doc["ledger"]
    waived = len(ledger["waived_missing"]) + len(ledger["waived_unused"])
    text = f"{ledger['consumed']:,} of {ledger['source_tensors']:,} source tensors consumed"
    text += f", {ledger['produced']:,} produced, {waived:,} waived"
    for key, what in (
        ("repeated", "repeated"),
        ("dropped", "dropped"),
        ("beside", "kept beside, outside the text model"),
    ):
        if ledger[key]:
            text += f", {len(ledger[key]):,} {what}"
    return text


def _stored(plan: Plan) -> Iterator[StoredTensor]:
    """The source's tensors as they lie in its files: an encoded one by its parts."""
    for name, tensor in ((n, t) for n, t in plan.sources.items() if n not in plan.selected):
        whole = plan.encoded.get(name)
        yield from (tensor,) if whole is None else whole.parts.values()


def _by_dtype(tensors: Iterable[tuple[str, int]]) -> Document:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for dtype, nbytes in tensors:
        counts[dtype] += 1
        sizes[dtype] += nbytes
    return {dtype: {"tensors": counts[dtype], "bytes": sizes[dtype]} for dtype in sorted(counts)}


def _files(job: Job, importing: bool) -> list[Document]:
    """Every file of the target; the size of an index that is made last is not known before."""
    from mbx.formats import hf, torch_dist

    base = job.base
    index: tuple[str, ...] = (torch_dist.TRACKER,) if importing else ()
    index = (*(base + name for name in job.placed.late_names), *index)
    files: list[Document] = [
        {"path": base + name, "bytes": size, "kind": "weights"} for name, size in job.file_sizes.items()
    ]
    files += [{"path": name, "bytes": len(text), "kind": "made"} for name, text in job.texts.items()]
    files += [{"path": name, "bytes": hf.packed_bytes(of), "kind": "made"} for name, of in job.packed.items()]
    files += [{"path": name, "bytes": None, "kind": "made"} for name in (*index, hf.MANIFEST)]
    files += [{"path": name, "bytes": path.stat().st_size, "kind": "copied"} for name, path in job.side_files.items()]
    return files


def _free_bytes(target: Path) -> int:
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _layout(layout: Document) -> str:
    """`tp 2, pp 4, ep 8, etp 1`: the two that every layout has, and what else is said."""
    shown = [
        "tp",
        "pp",
        *(k for k, v in layout.items() if k not in ("tp", "pp", "vocab_divisor") and v not in (None, 1)),
    ]
    return ", ".join(f"{key} {layout[key]}" for key in shown)


def _vocab(doc: Document) -> str:
    size, padded = doc["vocab"]["size"], doc["vocab"]["padded"]
    if padded is None or padded == size:
        return f"{size}, no padding"
    if doc["direction"] == "reshard":
        return f"{size}, in {padded} rows"
    if doc["layout"] is None:
        return f"{padded} stored, trimmed to {size}"
    return f"{size}, padded with zero rows to {padded}"


def _dtype_lines(doc: Document) -> list[str]:
    source, target = doc["dtypes"]["source"], doc["dtypes"]["target"]
    described = []
    for side in (source, target):
        described.append(
            ", ".join(f"{n} {plural(d['tensors'], 'tensor')} {human_bytes(d['bytes'])}" for n, d in side.items())
        )
    return [f"in: {described[0]}", f"out: {described[1]}", _changes(doc)]


def _changes(doc: Document) -> str:
    changes = doc["dtypes"]["changes"]
    if not changes:
        return f"unchanged ({', '.join(doc['dtypes']['target'])})"
    return ", ".join(f"{c['from']} → {c['to']} in {plural(c['count'], 'place')}" for c in changes)


def _file_lines(files: list[Document]) -> list[str]:
    if len(files) <= _SHOWN_FILES:
        return [f"{file['path']}  {human_bytes(file['bytes'])}" for file in files]
    total = sum(file["bytes"] for file in files)
    return [f"{files[0]['path']} … {Path(files[-1]['path']).name}  {len(files)} files, {human_bytes(total)}"]


def _copied_lines(files: Iterable[Path]) -> list[str]:
    """Names by folder: a tokenizer is copied into two."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent.name, []).append(file.name)
    named = [[f"{folder}/: {names[0]}" if folder else names[0], *names[1:]] for folder, names in folders.items()]
    return [line for names in named for line in wrapped(names, 12)]


def _note_lines(doc: Document) -> list[str]:
    ledger = doc["ledger"]
    notes = list(doc["notes"])
    for key, what in (("waived_missing", "written as zeros"), ("waived_unused", "left out")):
        if names := ledger[key]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            notes.append(f"{what}, as allowed: {names[0]}{more}")
    rest = len(notes) - _SHOWN_NOTES
    return notes[:_SHOWN_NOTES] + ([f"… and {rest} more; --json lists all"] if rest > 0 else [])


def _block(parts: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Labels in one column, texts in the next; a part without text is left out."""
    out = []
    for label, texts in parts:
        for i, text in enumerate(texts):
            first, *more = folded(text, " " * 11)
            out += [f"  {label if i == 0 else '':8} {first[11:]}", *more]
    return out
