"""Two opened checkpoints, made comparable: one plan that makes the tensors of one from those of the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.codecs import quantization_of
from converters.codecs.decode import Encoded, decoded_view
from converters.engine.plan import Plan, requested_dtype
from converters.errors import MbxError, UnsupportedError, UsageError
from converters.mcore.cuts import is_vocab
from converters.mcore.flavours import flavoured, in_flavour, usual_of
from converters.mcore.keys import parse_key
from converters.mcore.layout import Layout
from converters.planning.importer import plan_import
from converters.planning.pairing import Pairing, pair_by_name, pair_by_table
from converters.protocols import Source
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats.architecture import known_config, table_of
from mbx.formats.beside import with_config
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import config_file
from mbx.formats.registry import open_checkpoint
from mbx.formats.views import ViewSource, hf_view
from mbx.proof.carried import ahead_of, beside_of, carried_by, heads_of, with_carried, without_heads
from mbx.proof.gaps import Gap
from mbx.proof.respelling import respelt
from mbx.tables import table_for
from mbx.text import plural


@dataclass(frozen=True, slots=True)
class Pair:
    """`plan` makes the tensors `actual` of `right` from those of `left`, the two sides in the order of the plan.

    `swapped` says that the user named them the other way round. `equal` are tensors that have to repeat another one of
    their side, as (whether on the right side, name, the other's name). `repeated` are those that one side may lack:
    they repeat another, are recomputed, or belong to a model around this one. `fields` is the Megatron Core config as
    far as it is known. `limits` are the rows that are the vocabulary; what follows is padding. `gaps` are tensors of a
    model around this one that one side alone has. `source` reads `actual` where that is in no file of `right`.
    """

    left: Checkpoint
    right: Checkpoint
    plan: Plan
    actual: Mapping[str, StoredTensor]
    left_only: tuple[str, ...]
    right_only: tuple[str, ...]
    repeated: tuple[str, ...]
    fields: Mapping[str, Value]
    limits: Mapping[str, int]
    equal: tuple[tuple[bool, str, str], ...] = ()
    swapped: bool = False
    gaps: tuple[Gap, ...] = ()
    source: Source | None = None

    @property
    def nouns(self) -> tuple[str, str]:
        """What to call the two sides of the plan."""
        if self.left.spelling != self.right.spelling:
            named = ("the folder", "the checkpoint")
            return named if self.left.spelling == "hf" else named[::-1]
        return ("the second", "the first") if self.swapped else ("the first", "the second")


def open_sides(
    first: Path,
    second: Path,
    mapping: str | None = None,
    hf_config: Path | None = None,
    allowed_keys: tuple[str, ...] = (),
) -> tuple[Checkpoint, Checkpoint]:
    """Open what is to be compared; `hf_config` is a folder with config.json for a Megatron checkpoint without one.

    Unknown keys of config.json that the user waives, or that the conversion of either side waived, are so on both.
    """
    left, right = (with_config(open_checkpoint(path), hf_config).allowing(allowed_keys) for path in (first, second))
    keys = (*left.waived_keys, *right.waived_keys) if _has_unknown_keys((left, right), mapping) else ()
    return left.allowing(keys), right.allowing(keys)


def _has_unknown_keys(sides: Iterable[Checkpoint], mapping: str | None) -> bool:
    for side in sides:
        config = config_file(side)
        try:
            if config is not None and table_for(config, mapping).config.unknown_keys(config):
                return True
        except MbxError:  # pairing says it
            return False
    return False


def pair_sides(
    first: Checkpoint,
    second: Checkpoint,
    source: Mapping[int, Source],
    mapping: str | None = None,
    dtype: str | None = None,
) -> Pair:
    """Pair two checkpoints; `source` reads each by its `id`, `dtype` is a cast that the first was declared to undergo.

    Raises MbxError where no table covers them, as a conversion would, and for a cast between two of one kind.
    """
    for side in (first, second):
        if side.spelling == "peft":
            raise UnsupportedError(
                f"`{side.path}` is an adapter: what is compared are whole models",
                hint=f"mbx convert merge BASE {side.path} DST",
            )
    if first.spelling == second.spelling and dtype is not None:
        raise UsageError(
            f"‹dtype› {dtype} declares a cast between a folder and a Megatron checkpoint; both sides are of one kind",
            hint="leave it out: the report says whether values of two dtypes agree",
        )
    if first.spelling == second.spelling == "mcore":
        return _mcore_pair(first, second, source, mapping)
    if first.spelling == second.spelling == "hf":
        return _hf_pair(first, second, mapping)
    folder, checkpoint = (first, second) if first.spelling == "hf" else (second, first)
    table = flavoured(table_of(folder, folder.config, mapping), checkpoint.tensors)
    plan = plan_import(table, folder.config, folder.tensors, Layout(), dtype=requested_dtype(dtype))
    ahead = ahead_of(checkpoint, table, table.config.to_mcore(folder.config, allow_unused=folder.config))
    plan = without_heads(plan) if ahead else plan
    wanted = [draft.name for draft in plan.drafts]
    actual = respelt(checkpoint.tensors, wanted, source[id(checkpoint)])
    known = set(wanted)
    carried = carried_by(checkpoint, (*plan.ledger.beside, *(name for name in ahead if name in plan.sources)))
    lacking = [name for name in heads_of(table, plan) if name not in carried] if ahead else []
    left_beside = tuple(name for name in plan.ledger.beside if name not in carried)
    return Pair(
        folder,
        checkpoint,
        with_carried(plan, carried),
        {**actual, **carried},
        (*(name for name in wanted if name not in actual), *lacking),
        tuple(name for name in (*actual, *ahead) if name not in known and name not in carried),
        left_beside,
        plan.config,
        _limits(plan.config, actual),
        tuple((False, name, other) for name, other in plan.equal),
        swapped=first.spelling == "mcore",
        gaps=_alone(left_beside, "the folder"),
    )


def _alone(names: Collection[str], noun: str) -> tuple[Gap, ...]:
    """The gap of tensors around the text model that one side alone has."""
    if not names:
        return ()
    return (Gap("not compared", f"{plural(len(names), 'tensor')} beside the text model, which {noun} alone has"),)


def _mcore_pair(first: Checkpoint, second: Checkpoint, source: Mapping[int, Source], mapping: str | None) -> Pair:
    if mapping is not None:
        table_for({}, mapping)  # known_config would go on without a table that is not there
    fields = known_config(first, mapping)[0] or known_config(second, mapping)[0]
    if _arranged_otherwise(first, second, mapping):
        return _by_folder(first, second, fields, mapping)
    actual = respelt(second.tensors, first.tensors, source[id(second)])
    found = pair_by_name(first.tensors, actual, lambda name: parse_key(name).depth, fields)
    mine, other = (beside_of(side, mapping) for side in (first, second))
    both = {name: other[name] for name in mine if name in other}
    plan = replace(found.plan, sources={**found.plan.sources, **{name: mine[name] for name in both}})
    pair = _pair(first, second, replace(found, plan=with_carried(plan, both)), {**actual, **both}, fields)
    alone = _alone(mine.keys() - both.keys(), "the first") + _alone(other.keys() - both.keys(), "the second")
    return replace(pair, gaps=alone)


def _arranged_otherwise(first: Checkpoint, second: Checkpoint, mapping: str | None) -> bool:
    """Whether two checkpoints of one model are known to be of two flavours."""
    configs = config_file(first), config_file(second)
    if None in configs:
        return False
    try:
        left, right = (
            flavoured(table_for(config or {}, mapping), side.tensors)
            for config, side in zip(configs, (first, second), strict=True)
        )
    except MbxError:
        return False
    return left.name == right.name and (left.flavour, left.sites, left.blocks) != (
        right.flavour,
        right.sites,
        right.blocks,
    )


def _by_folder(first: Checkpoint, second: Checkpoint, fields: Mapping[str, Value], mapping: str | None) -> Pair:
    """Two flavours of one model, as the folders that both stand for."""
    left, right = hf_view(first, mapping), ViewSource(hf_view(second, mapping))
    plan, actual = left.plan, right.tensors
    names = [draft.name for draft in plan.drafts]
    return Pair(
        first,
        second,
        plan,
        actual,
        tuple(name for name in names if name not in actual),
        tuple(name for name in actual if name not in set(names)),
        (),
        fields,
        {},
        source=right,
    )


def _hf_pair(first: Checkpoint, second: Checkpoint, mapping: str | None) -> Pair:
    left, right = first.tensors, second.tensors
    table, fields = _read_by_table(first.config, mapping)
    if table is not None and table.flavours:
        table = in_flavour(table, usual_of(table))
    if table is None or _same_headers(left, right):
        found = pair_by_name(left, right, config=fields)
        found = replace(found, plan=replace(found.plan, table=table))
        return _pair(first, second, found, right, fields)
    mine, mine_encoded = _decoded(first)
    other, other_encoded = _decoded(second)
    if mine_encoded and other_encoded:
        raise UnsupportedError(
            "both folders are quantised, and differently: neither can be held against the other",
            hint="compare each with the folder it was made from",
        )
    if swapped := bool(other_encoded):
        first, second, mine, other = second, first, other, mine
    found = pair_by_table(table, fields, mine, other, mine_encoded or other_encoded)
    return replace(_pair(first, second, found, other, fields), swapped=swapped)


def _read_by_table(config: Mapping[str, Value], mapping: str | None) -> tuple[Table | None, dict[str, Value]]:
    """The table of a folder, and what its config.json says by it; none where no table describes it.

    A model for which Megatron Core has no counterpart is still the same in two folders.
    """
    try:
        table = table_for(config, mapping)
        return table, table.config.to_mcore(config, allow_unused=config)
    except MbxError:
        if mapping is None:
            return None, {}
        raise


def _decoded(side: Checkpoint) -> tuple[dict[str, StoredTensor], dict[str, Encoded]]:
    return decoded_view(side.tensors, quantization_of(side.config))


def _same_headers(left: Mapping[str, StoredTensor], right: Mapping[str, StoredTensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].dtype == right[name].dtype for name in left)


def _pair(
    left: Checkpoint,
    right: Checkpoint,
    found: Pairing,
    actual: Mapping[str, StoredTensor],
    fields: Mapping[str, Value],
) -> Pair:
    limits = _limits(fields, actual) if left.spelling == "mcore" else {}
    shared = found.plan.sources.keys() & actual.keys()
    for name in filter(is_vocab, shared) if left.spelling == "mcore" else ():
        limits.setdefault(name, min(found.plan.sources[name].shape[0], actual[name].shape[0]))
    return Pair(
        left,
        right,
        found.plan,
        actual,
        found.left_only,
        found.right_only,
        found.repeated,
        fields,
        limits,
        found.equal,
    )


def _limits(fields: Mapping[str, Value], tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    size = fields.get("model.vocab_size")
    return {name: size for name in tensors if is_vocab(name)} if isinstance(size, int) else {}
