"""The legs of parity that read tensors: cover and weights; and the differences they found."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from converters.engine.plan import Draft
from converters.mcore.cuts import is_vocab
from converters.mcore.keys import parse_key
from converters.protocols import Source
from converters.tensors import Shape, StoredTensor, nbytes_of
from mbx.formats.checkpoint import Checkpoint
from mbx.proof.cause_search import Detective
from mbx.proof.compare import ComparingSink, Reading, Tally, compare, repeats
from mbx.proof.comparison import Pair
from mbx.run.side_files import odd_padding

Status = Literal["passed", "failed", "not run"]
#: Differing tensors whose cause is looked for; the others are only counted.
_MOST_CAUSES = 100
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Leg:
    """One check: what it saw in one line, every finding in `details`, and measured `figures` by name."""

    name: str
    status: Status
    summary: str
    details: tuple[str, ...] = ()
    figures: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not what it should be.

    `elements` of `total` values differ, the first at `first`; `max_abs` is the largest difference of two values,
    infinite where one is not finite. For a tensor of another shape or dtype these are None, and `what` says so.
    `cause` is the likely one in a few words.
    """

    name: str
    dtype: str
    shape: Shape
    what: str
    elements: int | None = None
    total: int | None = None
    first: Shape | None = None
    max_abs: float | None = None
    cause: str | None = None

    @property
    def line(self) -> str:
        """The difference in one line."""
        largest = "" if self.max_abs is None else f", max |Δ| {self.max_abs:.3g}"
        return f"`{self.name}`: {self.what}{largest}" + (f": {self.cause}" if self.cause else "")


@dataclass(frozen=True, slots=True)
class Dtypes:
    """How many tensors were expected in one dtype and found in another (or the same)."""

    expected: str
    found: str
    tensors: int
    nbytes: int


def dtype_table(pair: Pair) -> tuple[Dtypes, ...]:
    """Dtypes of every tensor that both sides have."""
    tensors: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for draft in pair.plan.drafts:
        if (tensor := pair.actual.get(draft.name)) is not None:
            tensors[draft.dtype, tensor.dtype] += 1
            nbytes[draft.dtype, tensor.dtype] += tensor.nbytes
    return tuple(Dtypes(*key, count, nbytes[key]) for key, count in sorted(tensors.items()))


def cover(pair: Pair) -> tuple[Leg, frozenset[str], tuple[Difference, ...]]:
    """Names, shapes and dtypes on both sides; also the tensors whose values can be compared, and those that cannot."""
    left, right = pair.nouns
    findings = [f"missing in {right}: `{name}`" for name in pair.left_only]
    findings += [f"unexpected in {right}: `{name}`" for name in pair.right_only]
    comparable, odd = set(), []
    for draft in pair.plan.drafts:
        tensor = pair.actual.get(draft.name)
        if tensor is None:
            continue
        found = []
        if tensor.shape != draft.shape and not _only_padding(pair, draft, tensor):
            found.append(f"has shape {list(tensor.shape)}; {list(draft.shape)} was expected")
        if tensor.dtype != draft.dtype:
            found.append(f"is {tensor.dtype}; {draft.dtype} was expected")
        findings += [f"`{draft.name}` {what}" for what in found]
        if found:
            odd.append(Difference(draft.name, tensor.dtype, tensor.shape, found[0]))
        else:
            comparable.add(draft.name)
    count = len(pair.plan.sources) + (len(pair.left_only) if pair.left.spelling == pair.right.spelling else 0)
    unit = "keys" if pair.right.spelling == "mcore" else "tensors"
    summary = f"{count} {'keys' if pair.left.spelling == 'mcore' else 'tensors'} ↔ {len(pair.actual)} {unit}"
    leg = Leg("cover", "failed" if findings else "passed", summary, tuple(findings))
    return leg, frozenset(comparable), tuple(odd)


def _only_padding(pair: Pair, draft: Draft, tensor: StoredTensor) -> bool:
    """Whether the shapes differ by rows behind the vocabulary alone, which Megatron Core pads."""
    if not is_vocab(draft.name) or pair.right.spelling != "mcore" or tensor.shape[1:] != draft.shape[1:]:
        return False
    limit = pair.limits.get(draft.name)
    return limit is not None and min(tensor.shape[0], draft.shape[0]) >= limit


# --- weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights leg, the differences in the order of the model, and what stands in the padding rows."""

    leg: Leg
    differences: tuple[Difference, ...]
    padding: tuple[str, ...]
    tallies: Mapping[tuple[str, Shape], Tally]


def weights(
    pair: Pair,
    comparable: frozenset[str],
    odd: tuple[Difference, ...],
    left: Source,
    right: Source,
    reading: Reading,
) -> Weights:
    """Every value of every comparable tensor, bit for bit; causes of what differs."""
    detective = Detective(pair.plan, pair.actual, left, right, pair.fields, pair.limits, reading.max_memory)
    padding = tuple(_padding(pair.left, pair, left) + _padding(pair.right, pair, right))
    odd = tuple(_with_cause(detective, found) for found in odd)
    if not comparable:
        leg = Leg("weights", "failed", "nothing could be compared: no tensor has the expected name, shape and dtype")
        return Weights(leg, odd, padding, {})
    targets = {name: pair.actual[name] for name in pair.actual if name in comparable}
    sink = compare(pair.plan, targets, left, right, limits=pair.limits, reading=reading)
    order = {draft.name: place for place, draft in enumerate(pair.plan.drafts)}
    found = [*_differences(sink, targets, detective, order), *odd]
    differences = sorted(found, key=lambda difference: (_depth(difference), order.get(difference.name, len(order))))
    lines = sorted(f"`{d.name}`: {d.what}" for d in differences if d.elements is not None)
    lines += [*_unequal_repeats(pair, left, right), *odd_padding(pair.plan, left)]
    if skipped := len(pair.plan.drafts) - len(comparable):
        lines.append(f"{skipped} tensor(s) could not be compared: see cover")
    if not sink.compared_bytes:
        lines.append("no byte was compared")
    unequal = sum(d.elements is not None for d in differences)
    summary = f"{len(comparable)} tensors, {sink.compared_bytes} bytes compared, {unequal} differ"
    notes = [line for line in padding if "not zero" in line]
    leg = Leg("weights", "failed" if lines else "passed", summary, tuple(lines + notes))
    return Weights(leg, tuple(differences), padding, sink.tallies)


def _depth(found: Difference) -> tuple[int, int]:
    """How deep in the model a tensor lies: embeddings, layers by number, what follows them."""
    if match := re.search(r"\blayers\.(\d+)\.", found.name):
        return 2 if parse_key(found.name).site == "mtp" else 1, int(match[1])
    if parse_key(found.name).stacked:
        return 1, found.first[0] if found.first else 0
    return (0 if "embed" in found.name else 3), 0


def _with_cause(detective: Detective, found: Difference) -> Difference:
    other_dtype = found.what.startswith("is ")
    index = (0,) * detective.depths.get(found.name, 0)
    cause = detective.dtype_cause(found.name, index) if other_dtype else detective.cause(found.name, index)
    return replace(found, cause=cause)


def _differences(
    sink: ComparingSink, tensors: Mapping[str, StoredTensor], detective: Detective, order: Mapping[str, int]
) -> list[Difference]:
    by_name: dict[str, list[tuple[Shape, Tally]]] = {}
    total: Counter[str] = Counter()
    for (name, entry), tally in sink.tallies.items():
        total[name] += tally.compared
        if tally.differing:
            by_name.setdefault(name, []).append((entry, tally))
    worst = max(by_name, key=lambda name: max(t.max_abs for _, t in by_name[name]), default=None)
    out = []
    for number, name in enumerate(sorted(by_name, key=lambda name: order.get(name, 0))):
        entries = sorted(by_name[name], key=lambda item: item[0])
        count, first = sum(t.differing for _, t in entries), entries[0][1].first
        cause = None
        if number < _MOST_CAUSES or name == worst:
            cause = detective.cause(name, entries[0][0], first)
        tensor, largest = tensors[name], max(t.max_abs for _, t in entries)
        what = f"{count} element(s) differ, first at {list(first or ())}"
        out.append(Difference(name, tensor.dtype, tensor.shape, what, count, total[name], first, largest, cause))
    return out


def _unequal_repeats(pair: Pair, left: Source, right: Source) -> list[str]:
    """Tensors of one side that should repeat another one of it and do not."""
    lines = []
    for on_right, name, other in pair.equal:
        tensors, source = (pair.right.tensors, right) if on_right else (pair.left.tensors, left)
        if name not in tensors or other not in tensors:  # encoded: its parts are compared as they are
            continue
        if not repeats(pair.plan, tensors[name], tensors[other], source):
            lines.append(f"`{name}` should repeat `{other}` in {pair.nouns[on_right]}, and does not")
    return lines


def _padding(side: Checkpoint, pair: Pair, source: Source) -> list[str]:
    """What stands behind the vocabulary on a Megatron Core side, read in blocks."""
    lines = []
    for name in sorted(filter(is_vocab, side.tensors)) if side.spelling == "mcore" else ():
        limit, tensor = pair.limits.get(name), side.tensors[name]
        if limit is None or tensor.shape[0] <= limit:
            continue
        nonzero = 0
        for chunk in tensor.chunks:
            row = nbytes_of(tensor.dtype, chunk.sizes[1:])
            skip = max(0, limit - chunk.offsets[0])
            for at in range(skip * row, chunk.sizes[0] * row, _BLOCK):
                block = np.empty(min(_BLOCK, chunk.sizes[0] * row - at), np.uint8)
                source.read_into(chunk.file, source.data_start(chunk) + at, block.data)
                nonzero += int(np.count_nonzero(block.reshape(-1, nbytes_of(tensor.dtype, ())).any(axis=1)))
        rows = tensor.shape[0] - limit
        values = rows * math.prod(tensor.shape[1:])
        what = "all zero" if not nonzero else f"{nonzero} of {values} padding value(s) are not zero"
        lines.append(f"`{name}` in {side.path.name}: {rows} padding rows, {what}")
    return lines
