"""What a live model is under Hugging Face's names: the export plan of what its ranks hold, as boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from converters.adapters.sites import spellings
from converters.engine.boxes import Box, boxes_of, check_cover
from converters.engine.plan import FLOATS, Plan, requested_dtype
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.mcore.keys import bare
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.rows.config_map import environment
from converters.rows.table import Row, Table
from converters.tensors import StoredTensor
from mbx.live.routing import TensorSpec, together
from mbx.live.source import Source

Experts = Literal["folder", "each"]
_HEADS = "mtp_num_layers"
#: Projections that engines put into one matrix and take in one call only.
_TOGETHER = (("q_a_proj", "kv_a_proj_with_mqa"),)


@dataclass(frozen=True, slots=True)
class Stream:
    """Tensors of an export in their order, and the boxes that make each."""

    plan: Plan
    specs: tuple[TensorSpec, ...]
    boxes: Mapping[str, tuple[Box, ...]]

    @property
    def spread(self) -> str:
        """A tensor that has one row for several of the model's; empty where there is none."""
        moves = (move for unit in self.plan.units for move in unit.moves)
        return next((move.target.tensor for move in moves if move.target.slot.times > 1), "")


def plan_stream(
    source: Source, held: Mapping[str, StoredTensor], experts: Experts, dtype: str | None, exact_norms: bool
) -> Stream:
    """The stream of a model whose ranks hold `held`; the ledger is settled, and every element accounted for.

    `dtype` None is the folder's own, tensor by tensor (without a folder the model's), "model" what the model holds.
    Raises CoverageError for what is left over on either side.
    """
    if experts not in ("folder", "each"):
        raise UsageError(f"‹experts› {experts!r} is not known", hint="choices: folder, each")
    recorded = source.recorded if experts == "folder" else _each_apart(source)
    asked = None if dtype == "model" else requested_dtype(dtype)
    plan = plan_export(
        source.table, source.fields, held, Origin(recorded), dtype=asked, exact_norms=exact_norms and dtype == "model"
    )
    if dtype is None and recorded is not None and source.recorded is not None:
        plan = replace(plan, drafts=tuple(replace(d, dtype=_own(d.dtype, recorded.get(d.name))) for d in plan.drafts))
    moves = (move for unit in plan.units for move in unit.moves)
    stored = {move.target.tensor: plan.sources[move.source.tensor].dtype for move in moves}
    changes = Counter((stored[d.name], d.dtype) for d in plan.drafts if d.name in stored and stored[d.name] != d.dtype)
    plan = replace(plan, dtype_changes=changes)
    boxes: dict[str, list[Box]] = {draft.name: [] for draft in plan.drafts}
    for box in boxes_of(plan):
        boxes[box.tensor].append(box)
    check_cover(plan, boxes)
    specs = [TensorSpec(d.name, d.dtype, d.shape, _group(d.name)) for d in plan.drafts]
    ordered = tuple(spec for group in together(specs) for spec in group)
    return Stream(plan, ordered, {name: tuple(own) for name, own in boxes.items()})


def as_built(source: Source, *, heads: bool) -> Source:
    """The source of a model that was built with its layers of multi-token prediction (`heads`), or without."""
    return source if heads else replace(source, fields={**source.fields, _HEADS: None})


def left_out(source: Source, stream: Stream, *, heads: bool) -> tuple[str, ...]:
    """Tensors of the folder that the model has none of: a vision tower's, buffers, `heads` that were not built.

    CoverageError for any other: a model that lacks a layer must not pass for one that was never there.
    """
    made, table = {spec.name for spec in stream.specs}, source.table
    rows = list(table.expand(environment(source.fields), source.recorded))
    known = {
        name for row in rows if row.spec.drop or (bare(row.site).startswith("mtp.") and not heads) for name in row.hf
    }
    left = [name for name in source.recorded or {} if name not in made]
    if odd := [name for name in left if name not in known and not name.startswith(table.beside)]:
        raise CoverageError(
            f"the model has no values for {len(odd)} tensor(s) of the folder, first `{odd[0]}`", details=odd
        )
    return tuple(left)


def _own(made: str, recorded: HfTensor | None) -> str:
    return recorded.dtype if recorded is not None and recorded.dtype in FLOATS and made in FLOATS else made


def _group(name: str) -> str | None:
    parts = name.split(".")
    for number, group in enumerate(_TOGETHER):
        for at, part in enumerate(parts):
            if part in group:
                return ".".join((*parts[:at], f"<{number}>", *parts[at + 1 :]))
    return None


def _each_apart(source: Source) -> dict[str, HfTensor]:
    """What the folder would record if it kept an expert a tensor; UnsupportedError where no row has such names."""
    env = environment(source.fields)
    rows = [row for row in source.table.expand(env, source.recorded) if not row.spec.drop]
    out: dict[str, HfTensor] = {}
    for row in rows:
        apart = row if not row.spec.stacked else _apart(source.table, row)
        known = (source.recorded or {}).get(row.hf[0])
        dtype = known.dtype if known is not None else row.spec.dtype or "BF16"
        out.update((name, HfTensor(dtype, ())) for name in apart.hf)
    return out


def _apart(table: Table, row: Row) -> Row:
    found = next((other for other in spellings(table, row) if not other.spec.stacked), None)
    if found is None:
        raise UnsupportedError(
            f"‹experts› each: table `{table.name}` has no name for a single expert of `{row.hf[0]}`",
            hint="‹experts› folder gives all experts of a layer in one tensor",
        )
    return found


def chosen(specs: Sequence[TensorSpec], only: object) -> tuple[TensorSpec, ...]:
    """The tensors that `only` names: a pattern, names, or a predicate of names; UsageError where it names none."""
    from fnmatch import fnmatchcase

    if only is None:
        return tuple(specs)
    if isinstance(only, str):
        found = tuple(spec for spec in specs if fnmatchcase(spec.name, only))
    elif callable(only):
        found = tuple(spec for spec in specs if only(spec.name))
    else:
        assert isinstance(only, Collection)
        known = {spec.name for spec in specs}
        if missing := sorted(set(only) - known):
            raise UsageError(f"‹only› names `{missing[0]}`, which the model has not", details=missing)
        found = tuple(spec for spec in specs if spec.name in only)
    if not found:
        raise UsageError(f"‹only› {only!r} names no tensor")
    return found
