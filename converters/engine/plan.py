"""A conversion plan: every source and target tensor, the moves between them, and the ledger, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from converters.codecs.decode import Encoded
from converters.engine.regions import Move, Region
from converters.engine.selected import Selected
from converters.errors import CoverageError, UsageError
from converters.mcore.keys import bare
from converters.mcore.layout import Layout
from converters.rows.coverage import Ledger
from converters.rows.expr import Value
from converters.rows.ops import Dims, Form, form
from converters.rows.pack import Slot
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor, nbytes_of

if TYPE_CHECKING:
    from converters.engine.scaling import Update

#: `dtype` values and the storage dtype each asks for.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
#: Dtypes of tensors that stand for themselves; others are codes of some codec.
STORABLE = frozenset(("BF16", "F16", "F32", "F64", "I64", "I32", "BOOL"))
FLOATS = frozenset(("BF16", "F16", "F32", "F64"))


@dataclass(frozen=True, slots=True)
class Draft:
    """A target tensor before a writer gives its chunks a place: boxes as (rank, offsets, sizes)."""

    name: str
    dtype: str
    shape: Shape
    boxes: tuple[tuple[int, Shape, Shape], ...]

    @classmethod
    def whole(cls, name: str, dtype: str, shape: Shape) -> Draft:
        """A tensor in one box."""
        return cls(name, dtype, shape, ((0, (0,) * len(shape), shape),))


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a target tensor that a unit fills: rows that no move reaches become zero."""

    tensor: str
    index: tuple[int, ...]
    fold: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest independent part of a conversion: one row of the table at one layer and expert.

    `shift` is added to every value. Where that rounds, the way back would not find the value again: `original`
    names a source tensor, of the target's shape, whose value is taken wherever it still maps to what is stored.
    """

    row: str
    moves: tuple[Move, ...]
    entries: tuple[Entry, ...]
    shift: int = 0
    original: str | None = None


def as_it_is(source: str, target: str, stack: Shape, rows: int) -> list[Unit]:
    """Units that carry the first `rows` rows of each entry of a stack to the same entry of another tensor."""
    slot = Slot.whole(rows)
    return [
        Unit(target, (Move(Region(source, index, slot), Region(target, index, slot)),), (Entry(target, index),))
        for index in product(*map(range, stack))
    ]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. The run executes this object; `dry_run` prints it.

    `equal` are pairs of source tensors that must hold the same values, `padded` those that hold zeros from a row on.
    `objects` are the names of opaque
    payloads (`_extra_state`) the target carries. `kept` are sources that travel beside the target as they are:
    buffers without a counterpart, and values that a shift rounds. `encoded` are the sources that a codec stores in
    parts, `carried` those parts that travel beside the target, for an export that encodes again. `reencoded` are the
    target tensors that a codec stores in parts, which stand in `drafts` for them; `scales` the source's scales of
    these, and parts that no value changes, by the target's name and role, where they are at hand. `updates` are what
    an adapter or a calibration changes in an entry of a target tensor, by its name and index. `selected` are the
    sources that are a choice of rows and columns of others, which stand among the sources too.
    `table` is None where no name changes.
    """

    direction: str
    table: Table | None
    config: Mapping[str, Value]
    layout: Layout
    sources: Mapping[str, StoredTensor]
    drafts: tuple[Draft, ...]
    units: tuple[Unit, ...]
    ledger: Ledger
    equal: tuple[tuple[str, str], ...] = ()
    padded: tuple[tuple[str, int], ...] = ()
    objects: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dtype_changes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    encoded: Mapping[str, Encoded] = field(default_factory=dict)
    carried: tuple[StoredTensor, ...] = ()
    reencoded: Mapping[str, Encoded] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    updates: Mapping[tuple[str, Shape], Update] = field(default_factory=dict)
    selected: Mapping[str, Selected] = field(default_factory=dict)

    @classmethod
    def of_all(
        cls,
        direction: str,
        config: Mapping[str, Value],
        sources: Mapping[str, StoredTensor],
        drafts: Sequence[Draft],
        units: Sequence[Unit],
        *,
        table: Table | None = None,
        layout: Layout | None = None,
    ) -> Plan:
        """A plan that uses all of `sources`, waives nothing and changes no dtype."""
        ledger = Ledger(consumed=len(sources), produced=len(drafts))
        return cls(direction, table, config, layout or Layout(), sources, tuple(drafts), tuple(units), ledger)

    @property
    def stored_sources(self) -> Iterator[StoredTensor]:
        """Every tensor that a run reads, an encoded one by its parts."""
        made = self.encoded.keys() | self.selected.keys()
        yield from (tensor for name, tensor in self.sources.items() if name not in made)
        for whole in self.encoded.values():
            yield from whole.parts.values()
        for known in self.scales.values():
            yield from known.values()

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(tensor.nbytes for tensor in self.stored_sources)

    @property
    def target_bytes(self) -> int:
        """Bytes of all target tensors, containers not counted."""
        return sum(nbytes_of(draft.dtype, draft.shape) for draft in self.drafts)


def target_dtype(row: Row, source: str, requested: str | None) -> str:
    """Storage dtype on the Megatron Core side for a row whose source tensor has dtype `source`."""
    if source not in FLOATS:
        return source
    if row.spec.dtype is not None:
        return row.spec.dtype
    return source if requested is None or row.spec.keep_dtype else requested


def with_heads_present(config: Mapping[str, Value], rows: Sequence[Row]) -> dict[str, Value]:
    """`config` without multi-token-prediction layers that it announces and the checkpoint does not hold."""
    held = any(bare(row.site).startswith("mtp.") for row in rows)
    return dict(config) if held or "mtp_num_layers" not in config else {**config, "mtp_num_layers": None}


def requested_dtype(name: str | None) -> str | None:
    """Storage dtype of a `dtype` value; UsageError lists the choices."""
    if name is None:
        return None
    if name not in DTYPES:
        raise UsageError(f"‹dtype› {name!r} is not known", hint=f"choices: {', '.join(DTYPES)}")
    return DTYPES[name]


def row_form(row: Row, dims: Dims, rows: int) -> Form:
    """The form of a row's op, with the row named in every complaint."""
    try:
        return form(row.spec.op, dims, rows)
    except CoverageError as error:
        raise type(error)(f"`{row.mcore}` (op {row.spec.op}): {error.fact}", hint=error.hint) from error
