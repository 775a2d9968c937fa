"""`mbx diff`: what changed from one checkpoint to another, tensor by tensor, in one streamed pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from converters.tensors import Shape, StoredTensor
from mbx.formats.architecture import stated_config
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.files import FileSource
from mbx.formats.hf import config_file
from mbx.proof.compare import PLAIN, Reading, Tally, add_tally, compare
from mbx.proof.comparison import Pair, open_sides, pair_sides

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that both checkpoints have and that is not the same in both.

    `differing` of `compared` values differ; `relative` is |right - left| / |left| in Euclidean norms, None where the
    left side is all zero or something is not finite; `max_abs` is the largest difference. All are None where the
    shapes allow no comparison. Values are compared in the right side's dtype, and as far as both have rows.
    """

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[Shape, Shape]
    differing: int | None = None
    compared: int | None = None
    relative: float | None = None
    max_abs: float | None = None


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed; `changes` are sorted by `relative`, largest first, those without a figure before them.

    `removed` are tensors of the left side alone, `added` of the right. `relative` is that of all values together.
    `config` are (key, left, right); `has_settings` says whether both state settings under the same names. `gaps` say
    what one side alone has beside its model.
    """

    left: str
    right: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    changes: tuple[Change, ...]
    unchanged: int
    relative: float | None
    config: tuple[tuple[str, Value, Value], ...]
    has_settings: bool = True
    gaps: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs at all."""
        return not (self.removed or self.added or self.changes or self.config or self.gaps)


def diff(
    left: Path,
    right: Path,
    *,
    mapping: str | None = None,
    reading: Reading = PLAIN,
    hf_config: Path | None = None,
    allowed_keys: tuple[str, ...] = (),
) -> Diff:
    """Compare two checkpoints of any format.

    Against a Megatron checkpoint, names are its keys, and norms of one of each kind are relative to the folder.
    `hf_config` is a folder with config.json for a Megatron checkpoint that carries none, `allowed_keys` are unknown
    keys of config.json that are waived. Raises
    MbxError where one cannot be read, or no table brings them together.
    """
    sides = open_sides(left, right, mapping, hf_config, allowed_keys)
    sources = {id(side): FileSource(side.home) for side in sides}
    try:
        pair = pair_sides(*sides, sources, mapping)
        targets = _comparable(pair)
        sink = compare(
            pair.plan,
            targets,
            sources[id(pair.left)],
            sources[id(pair.right)],
            limits={**pair.limits, **_common_rows(pair, targets)},
            reading=reading,
            norms=True,
        )
    finally:
        for source in sources.values():
            source.close()
    return _report(pair, left, right, _by_tensor(sink.tallies))


def _comparable(pair: Pair) -> dict[str, StoredTensor]:
    """Tensors whose values can be held against each other: some unit makes each, and every partner in that unit."""
    made = {entry.tensor for unit in pair.plan.units for entry in unit.entries if entry.tensor in pair.actual}
    shapes = {draft.name: draft.shape for draft in pair.plan.drafts}
    if pair.left.spelling == pair.right.spelling:  # units of unlike shapes were not made
        return {name: tensor for name, tensor in pair.actual.items() if name in made}
    limits = pair.limits
    return {
        name: tensor
        for name, tensor in pair.actual.items()
        if name in made and (tensor.shape == shapes[name] or (name in limits and tensor.shape[0] >= limits[name]))
    }


def _common_rows(pair: Pair, targets: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Rows that both sides have of a tensor that one side has more of: a vocabulary that grew."""
    depths = {entry.tensor: len(entry.index) for unit in pair.plan.units for entry in unit.entries}
    rows = {}
    for name, tensor in targets.items():
        other, depth = pair.plan.sources.get(name), depths[name]
        if other is not None and other.shape != tensor.shape and len(tensor.shape) > depth:
            rows[name] = min(other.shape[depth], tensor.shape[depth], pair.limits.get(name, tensor.shape[depth]))
    return rows


def _by_tensor(tallies: Mapping[tuple[str, Shape], Tally]) -> dict[str, Tally]:
    totals: defaultdict[str, Tally] = defaultdict(Tally)
    for (name, _), tally in tallies.items():
        add_tally(totals[name], tally)
    return dict(totals)


def _report(pair: Pair, left: Path, right: Path, totals: Mapping[str, Tally]) -> Diff:
    changes, unchanged = [], 0
    for draft in pair.plan.drafts:
        actual, tally = pair.actual.get(draft.name), totals.get(draft.name)
        if actual is None:
            continue
        origin = pair.plan.sources.get(draft.name)
        before = (draft.dtype, draft.shape) if origin is None else (origin.dtype, origin.shape)
        dtypes, shapes = (before[0], actual.dtype), (before[1], actual.shape)
        alike = dtypes[0] == dtypes[1] and (shapes[0] == shapes[1] or _is_padded(pair, draft.name, shapes))
        if alike and (0 in actual.shape or (tally is not None and not tally.differing)):
            unchanged += 1
        elif tally is None:
            changes.append(Change(draft.name, dtypes, shapes))
        else:
            figures = tally.differing, tally.compared, _relative(tally.change, tally.norm), tally.max_abs
            changes.append(Change(draft.name, dtypes, shapes, *figures))
    settings = _config(pair.left, pair.right)
    changes.sort(key=lambda change: (change.relative is not None, -(change.relative or 0.0)))
    change, norm = sum(t.change for t in totals.values()), sum(t.norm for t in totals.values())
    found = Diff(
        str(left),
        str(right),
        pair.left_only,
        pair.right_only,
        tuple(changes),
        unchanged,
        _relative(change, norm),
        tuple(settings or ()),
        settings is not None,
        tuple(gap.line for gap in pair.gaps),
    )
    return _turned(found) if pair.swapped else found


def _is_padded(pair: Pair, name: str, shapes: tuple[Shape, Shape]) -> bool:
    """Whether two shapes of a tensor differ in rows behind a vocabulary of stated size."""
    size = pair.fields.get("model.vocab_size")
    whole = isinstance(size, int) and all(shape[:1] >= (size,) for shape in shapes)
    return whole and name in pair.limits and shapes[0][1:] == shapes[1][1:]


def _turned(found: Diff) -> Diff:
    """The report of a pair that the plan took the other way round: lists change places, figures of size stay."""
    changes = tuple(
        Change(c.name, c.dtypes[::-1], c.shapes[::-1], c.differing, c.compared, c.relative, c.max_abs)
        for c in found.changes
    )
    config = tuple((key, new, old) for key, old, new in found.config)
    return replace(found, removed=found.added, added=found.removed, changes=changes, config=config)


def _relative(change: float, norm: float) -> float | None:
    if not change:
        return 0.0
    ratio = math.sqrt(change) / math.sqrt(norm) if norm > 0 else math.inf
    return ratio if math.isfinite(ratio) else None


def _config(left: Checkpoint, right: Checkpoint) -> list[tuple[str, Value, Value]] | None:
    """Settings that differ, in Hugging Face's names where both have a config.json, in Megatron's where neither has.

    None where one side states none, or each states its own kind.
    """
    mine, other = _settings(left), _settings(right)
    if mine is None or other is None or mine[1] != other[1]:
        return None
    names = sorted(set(mine[0]) | set(other[0]))
    return [(key, mine[0].get(key), other[0].get(key)) for key in names if mine[0].get(key) != other[0].get(key)]


def _settings(side: Checkpoint) -> tuple[Mapping[str, Value], bool] | None:
    if (config := config_file(side)) is not None:
        return canonical(config), True
    fields, _ = stated_config(side)
    return (fields, False) if fields else None
