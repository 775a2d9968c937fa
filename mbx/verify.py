"""Parity of a Hugging Face folder and a Megatron Core checkpoint, in legs that are reported apart.

cover: every tensor on both sides is accounted for. config: the settings agree. weights: every byte agrees,
streamed through the same plan an import would run. forward: Transformers and Megatron Core compute the same
logits. A round trip alone proves nothing (a swapped pair of rows survives it), so no leg stands for another.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from converters.errors import DifferenceError, StorageError, UnsupportedError
from converters.importer import plan_import
from converters.isos import inexpressible_rope
from converters.layout import Layout
from converters.plan import Draft, Plan
from converters.spelling import canonical
from converters.stream import Engine
from converters.tensors import DTYPE_BITS, Chunk, StoredTensor, nbytes_of
from mbx.convert import DEFAULT_MAX_MEMORY
from mbx.io import hf
from mbx.io.checkpoint import McoreCheckpoint, open_any
from mbx.io.files import FileSource
from mbx.mcore.prompts import DRAWN, Prompts
from mbx.registry import table_for

Status = Literal["passed", "failed", "not run"]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Leg:
    """One check: what it saw in one line, and every finding in `details`."""

    name: str
    status: Status
    summary: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All legs of one comparison."""

    left: str
    right: str
    table: str
    legs: tuple[Leg, ...]

    @property
    def passed(self) -> bool:
        """Whether every leg that was asked for ran and passed."""
        return all(leg.status == "passed" for leg in self.legs)


def parity(
    hf_path: Path,
    mcore_path: Path,
    *,
    forward: bool = False,
    device: str = "cpu",
    prompts: Prompts = DRAWN,
    mapping: str | None = None,
    workers: int = 2,
    max_memory: int = DEFAULT_MAX_MEMORY,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compare the checkpoint at `mcore_path` with the Hugging Face folder it should equal.

    `device` and `prompts` are the forward leg's: `cuda` runs it on one GPU with Transformer Engine. Raises MbxError
    only where a side, the prompts or the device cannot be had at all; differences are findings of a leg.
    """
    folder = hf.open_hf(hf_path)
    opened = open_any(mcore_path)
    table = table_for(folder.config, mapping)
    plan = plan_import(table, folder.config, folder.tensors, Layout())
    actual = opened.tensors
    cover, comparable = _cover(plan, actual)
    legs = [cover, _config(plan, folder, opened)]
    legs.append(_weights(plan, actual, comparable, hf_path, opened.iteration, workers, max_memory, progress))
    if forward and opened.format != "torch_dist":
        summary = "Megatron Core loads torch_dist checkpoints only: `mbx convert reshard` makes one"
        legs.append(Leg("forward", "not run", summary))
    elif forward:
        embedding = actual.get("embedding.word_embeddings.weight")
        padded = embedding.shape[0] if embedding else None
        legs.append(_forward(plan, folder, opened.iteration, padded, device, prompts))
    return ParityReport(str(hf_path), str(mcore_path), table.name, tuple(legs))


def _cover(plan: Plan, actual: Mapping[str, StoredTensor]) -> tuple[Leg, frozenset[str]]:
    """Names, shapes and dtypes on both sides; returns the tensors whose values can be compared."""
    wanted = {draft.name: draft for draft in plan.drafts}
    padded = _vocab_tensors(plan)
    findings = [f"missing in the checkpoint: `{name}`" for name in wanted if name not in actual]
    findings += [f"unexpected in the checkpoint: `{name}`" for name in actual if name not in wanted]
    comparable = set()
    for name, draft in wanted.items():
        if (tensor := actual.get(name)) is None:
            continue
        same_shape = tensor.shape == draft.shape or (
            name in padded and tensor.shape[0] >= draft.shape[0] and tensor.shape[1:] == draft.shape[1:]
        )
        if not same_shape:
            findings.append(f"`{name}` has shape {list(tensor.shape)}; {list(draft.shape)} was expected")
        if tensor.dtype != draft.dtype:
            findings.append(f"`{name}` is {tensor.dtype}; {draft.dtype} was expected")
        if same_shape and tensor.dtype == draft.dtype:
            comparable.add(name)
    summary = f"{len(plan.sources)} tensors ↔ {len(actual)} keys"
    return Leg("cover", "failed" if findings else "passed", summary, tuple(findings)), frozenset(comparable)


def _vocab_tensors(plan: Plan) -> frozenset[str]:
    """Keys that may carry padding rows behind the vocabulary."""
    embedding = {"embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"}
    return frozenset(draft.name for draft in plan.drafts if draft.name in embedding)


def _config(plan: Plan, folder: hf.HfFolder, opened: McoreCheckpoint) -> Leg:
    """Settings of the checkpoint's own config.json against the folder's, field by field."""
    if opened.hf is None:
        return Leg("config", "not run", "the checkpoint carries no config.json (hf/)")
    assert plan.table is not None  # plan_import has one
    other = plan.table.config.to_mcore(hf.read_config(opened.hf))
    findings = [
        f"`{field}`: {plan.config.get(field)!r} in the folder, {other.get(field)!r} in the checkpoint"
        for field in sorted(set(plan.config) | set(other))
        if plan.config.get(field) != other.get(field)
    ]
    return Leg("config", "failed" if findings else "passed", f"{len(plan.config)} fields", tuple(findings))


class ComparingSink:
    """A sink that compares what the engine would write with what the checkpoint holds."""

    def __init__(self, source: FileSource, tensors: Mapping[str, StoredTensor], vocab: Mapping[str, int]) -> None:
        self.source, self.vocab = source, vocab
        self.compared_bytes = 0
        self.findings: dict[str, tuple[int, str]] = {}
        self.padding: dict[str, int] = {}
        self._starts: dict[str, list[tuple[int, str, Chunk, str]]] = {}
        for tensor in tensors.values():
            for chunk in tensor.chunks:
                self._starts.setdefault(chunk.file, []).append((chunk.start, tensor.name, chunk, tensor.dtype))
        for places in self._starts.values():
            places.sort(key=lambda place: place[0])
        self._lock = threading.Lock()

    def data_start(self, chunk: Chunk) -> int:
        """Where the checkpoint keeps a chunk's data."""
        return self.source.data_start(chunk)

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Compare `data` with the stored bytes; differences are counted by tensor."""
        stored = np.empty(len(data), np.uint8)
        self.source.read_into(file, start, stored.data)
        wanted = np.frombuffer(data, np.uint8)
        unequal = np.flatnonzero(stored != wanted) if not np.array_equal(stored, wanted) else None
        with self._lock:
            self.compared_bytes += len(data)
            if unequal is not None:
                self._blame(file, start, unequal, len(data))

    def _blame(self, file: str, start: int, unequal: np.ndarray[tuple[int], np.dtype[np.int64]], nbytes: int) -> None:
        places = self._starts[file]
        _, name, chunk, dtype = places[bisect_right(places, start, key=lambda place: place[0]) - 1]
        item = DTYPE_BITS[dtype] // 8
        elements = np.unique((unequal + (start - self.source.data_start(chunk))) // item)
        if name in self.vocab:
            row = elements // max(1, nbytes_of(dtype, chunk.sizes[1:]) // item) + chunk.offsets[0]
            pads = int((row >= self.vocab[name]).sum())
            self.padding[name] = self.padding.get(name, 0) + pads
            elements = elements[row < self.vocab[name]]
            if not len(elements):
                return
        first = np.unravel_index(int(elements[0]), chunk.sizes) if chunk.sizes else ()
        position = [int(a) + b for a, b in zip(first, chunk.offsets, strict=True)]
        count, where = self.findings.get(name, (0, ""))
        self.findings[name] = (count + len(elements), where or f"first at {position}")

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Nothing surrounds a compared chunk."""


def _weights(
    plan: Plan,
    actual: Mapping[str, StoredTensor],
    comparable: frozenset[str],
    hf_path: Path,
    iteration: Path,
    workers: int,
    max_memory: int,
    progress: Progress,
) -> Leg:
    """Every value of every comparable tensor, bit for bit."""
    if not comparable:
        return Leg("weights", "failed", "nothing could be compared: no tensor has the expected name, shape and dtype")
    units = tuple(
        unit for unit in plan.units if unit.entries and all(entry.tensor in comparable for entry in unit.entries)
    )
    targets = {name: actual[name] for name in comparable}
    left, right = FileSource(hf_path), FileSource(iteration)
    size = plan.config.get("model.vocab_size")
    vocab = {name: size for name in _vocab_tensors(plan) if isinstance(size, int)}
    sink = ComparingSink(right, targets, vocab)
    narrowed = replace(plan, drafts=_drafts(targets), units=units)
    try:
        untied = [pair for pair in plan.equal if not _same_values(left, *(plan.sources[name] for name in pair))]
        Engine(narrowed, targets, left, sink, workers=workers, max_memory=max_memory).run(progress)
    finally:
        left.close()
        right.close()
    findings = [
        f"`{name}`: {count} element(s) differ, {where}" for name, (count, where) in sorted(sink.findings.items())
    ]
    findings += [f"`{name}` should repeat `{other}` in the folder, and does not" for name, other in untied]
    notes = [f"`{name}`: {count} padding value(s) are not zero" for name, count in sink.padding.items() if count]
    skipped = len(plan.drafts) - len(comparable)
    if skipped:
        findings.append(f"{skipped} tensor(s) could not be compared: see cover")
    summary = f"{len(comparable)} tensors, {sink.compared_bytes} bytes compared, {len(sink.findings)} differ"
    return Leg("weights", "failed" if findings else "passed", summary, tuple(findings + notes))


def _same_values(source: FileSource, left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors of the folder hold the same bytes; read in pieces of 8 MiB."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    starts = [(tensor.chunks[0].file, source.data_start(tensor.chunks[0])) for tensor in (left, right)]
    for at in range(0, left.nbytes, 8 << 20):
        parts = [bytearray(min(8 << 20, left.nbytes - at)) for _ in starts]
        for (file, start), part in zip(starts, parts, strict=True):
            source.read_into(file, start + at, memoryview(part))
        if parts[0] != parts[1]:
            return False
    return True


def _drafts(tensors: Mapping[str, StoredTensor]) -> tuple[Draft, ...]:
    return tuple(Draft(t.name, t.dtype, t.shape, ()) for t in tensors.values())


def _forward(
    plan: Plan, folder: hf.HfFolder, iteration: Path, padded_vocab: int | None, device: str, prompts: Prompts
) -> Leg:
    """fp32 logits of Transformers and of Megatron Core at every position of the prompts."""
    from mbx.mcore.parity import compare_forward, read_prompts, vocab_size

    config = canonical(folder.config)
    inexpressible = set(inexpressible_rope(config))
    if others := [note for note in plan.notes if note not in inexpressible]:
        return Leg("forward", "not run", others[0], tuple(others))
    if plan.table is not None and plan.table.unsupported:
        return Leg("forward", "not run", plan.table.unsupported)
    vocab = vocab_size(plan.config)
    if padded_vocab is not None and padded_vocab < vocab:
        return Leg("forward", "failed", f"the checkpoint embeds {padded_vocab} tokens, the vocabulary has {vocab}")
    read = read_prompts(prompts, plan.config, folder.path, config)
    try:
        found = compare_forward(
            plan.config, folder.path, iteration, config, read, padded_vocab=padded_vocab, device=device
        )
    except UnsupportedError as error:
        return Leg("forward", "not run", error.fact, error.details)
    except (StorageError, DifferenceError) as error:
        return Leg("forward", "failed", error.fact, error.details)
    return Leg("forward", "passed" if found.diff.ok else "failed", found.summary, found.details)
