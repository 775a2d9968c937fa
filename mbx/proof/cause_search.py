"""Looks for the cause of differing tensors: reads single entries of both sides again, within a memory budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from converters.causes import Peer, Rows, Suspect, find_cause
from converters.causes.row_orders import Heads, Structure
from converters.engine.pieces import moves_into
from converters.engine.plan import Entry, Plan, Unit
from converters.engine.planned import PlannedTensors
from converters.engine.regions import matrix
from converters.errors import DeviceError
from converters.mcore.keys import parse_key
from converters.mcore.layout import count_of
from converters.protocols import Source
from converters.rows.expr import Value
from converters.rows.pack import Pack, Slot
from converters.stored import Bytes, read_rows
from converters.tensors import DTYPE_BITS, Shape, StoredTensor

Index = npt.NDArray[np.int64]
#: Other layers, experts and tensors that the values are held against.
_MOST_PEERS = 512


class EntryRows:
    """One entry of a tensor, of `shape`, as `converters.causes.Rows`: `read` gives rows from the first on, so many.

    An entry of at most `budget` bytes is read once and kept; rows of a larger one are read again when asked for. Rows
    from `limit` on are not compared.
    """

    def __init__(
        self, read: Callable[[int, int], Bytes], shape: Shape, dtype: str, budget: int, limit: int | None = None
    ) -> None:
        self.read, self.dtype, self.budget = read, dtype, budget
        self._held, self.cols = matrix(shape, 0)
        self.rows = self._held if limit is None else min(self._held, limit)
        self._pitch = self.cols * DTYPE_BITS[dtype] // 8
        self._kept: Bytes | None = None

    def take(self, index: Index) -> Bytes:
        """Bytes of some rows: [len(index), bytes of a row]."""
        if self._kept is None and self._held * self._pitch <= self.budget:
            self._kept = self.read(0, self._held)
        if self._kept is not None:
            return self._kept[index]
        out = np.empty((len(index), self._pitch), np.uint8)
        edges = np.flatnonzero(np.diff(index) != 1) + 1
        for part in np.split(np.arange(len(index)), edges):
            if len(part):
                out[part] = self.read(int(index[part[0]]), len(part))
        return out


@dataclass(frozen=True, slots=True)
class _Spot:
    """An entry of the plan: what it is, apart from the layer and the expert it is of."""

    unit: Unit
    entry: Entry
    layer: int | None
    expert: int | None
    kind: str


_NUMBER = re.compile(r"(?<=\.)\d+(?=[. ]|$)|(?<=weight)\d+(?= |$)|(?<=bias)\d+(?= |$)")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(?:\w+\.)*?(\d+)(?=\.|$)|experts\..*?weight(\d+)$|experts\..*?bias(\d+)$")


class Detective:
    """Finds causes for entries of one comparison: `plan` makes the tensors of `right` from those of `left`."""

    def __init__(
        self,
        plan: Plan,
        actual: Mapping[str, StoredTensor],
        left: Source,
        right: Source,
        fields: Mapping[str, Value],
        limits: Mapping[str, int],
        max_memory: int,
    ) -> None:
        if plan.reencoded:  # the parts of a codec have no rows of a model
            coded = plan.reencoded.keys()
            plain = tuple(unit for unit in plan.units if coded.isdisjoint(entry.tensor for entry in unit.entries))
            plan = replace(plan, units=plain, reencoded={})
        self.plan, self.actual, self.left, self.right, self.fields = plan, actual, left, right, fields
        self.limits = limits
        self.budget = max(1 << 20, max_memory // 8)
        self.planned = PlannedTensors(plan, left, max(1 << 24, self.budget))

    @cached_property
    def spots(self) -> dict[tuple[str, Shape], _Spot]:
        """Every entry of the plan; found when first asked for, as most comparisons need none."""
        return {(e.tensor, e.index): self._spot(unit, e) for unit in self.plan.units for e in unit.entries}

    @cached_property
    def depths(self) -> dict[str, int]:
        """Leading dimensions of each tensor that stack entries."""
        return {entry.tensor: len(entry.index) for unit in self.plan.units for entry in unit.entries}

    def _spot(self, unit: Unit, entry: Entry) -> _Spot:
        layer, expert = _number(_LAYER, unit.row), _number(_EXPERT, unit.row)
        key = parse_key(entry.tensor)
        if key.depth == len(entry.index) and key.depth:
            stacked_layer, stacked_expert = key.at(entry.index)
            layer = stacked_layer if stacked_layer is not None else layer
            expert = stacked_expert if stacked_expert is not None else expert
        kind = _NUMBER.sub("#", f"{unit.row} {entry.tensor}")
        return _Spot(unit, entry, layer, expert, kind)

    def cause(self, name: str, index: Shape = (), first: Shape | None = None) -> str | None:
        """The likely cause for one entry of a tensor, None where there is none, or it cannot be read in the memory."""
        spot, stored = self.spots.get((name, index)), self.actual.get(name)
        try:
            if stored is None:
                return None
            if spot is None:
                return self._cause_by_name(stored)
            actual = self._stored(stored, index, self.right, self.limits.get(name))
            expected = self._expected(spot, stored.dtype)
            row = first[len(index)] if first is not None and len(first) > len(index) else 0
            structure = self._structure(spot, expected.rows)
            return find_cause(expected, actual, Suspect(structure, tuple(self._peers(spot)), row))
        except DeviceError:
            return None

    def _cause_by_name(self, stored: StoredTensor) -> str | None:
        """For a tensor that no unit makes, its shape being another: against the left side's of that name."""
        wanted = self.plan.sources.get(stored.name)
        index = (0,) * parse_key(stored.name).depth
        if wanted is None or wanted.dtype != stored.dtype or len(wanted.shape) != len(stored.shape):
            return None
        return find_cause(self._stored(wanted, index, self.left), self._stored(stored, index, self.right), Suspect())

    def dtype_cause(self, name: str, index: Shape = ()) -> str | None:
        """What the values of a tensor of another dtype are: the expected ones after a cast, or something else."""
        spot, stored = self.spots.get((name, index)), self.actual.get(name)
        if spot is None or stored is None:
            return None
        try:
            actual = self._stored(stored, index, self.right, self.limits.get(name))
            expected = self._expected(spot, stored.dtype)
            if (actual.rows, actual.cols) != (expected.rows, expected.cols):
                return None
            step = max(1, (1 << 20) // max(1, actual.cols))
            for row in range(0, actual.rows, step):
                block = np.arange(row, min(row + step, actual.rows), dtype=np.int64)
                if not np.array_equal(actual.take(block), expected.take(block)):
                    return "the values differ also after a cast"
        except DeviceError:
            return None
        return f"the values are those of {self.planned.drafts[name].dtype}, cast to {stored.dtype}"

    def _stored(self, tensor: StoredTensor, index: Shape, source: Source, limit: int | None = None) -> EntryRows:
        """An entry of a tensor as it is stored."""
        read = partial(read_rows, tensor, source, index)
        return EntryRows(read, tensor.shape[len(index) :], tensor.dtype, self.budget, limit)

    def _expected(self, spot: _Spot, dtype: str) -> EntryRows:
        """An entry as the plan makes it, in the dtype it is stored in."""
        name, index = spot.entry.tensor, spot.entry.index
        read = partial(self.planned.read_rows, name, index, dtype=dtype)
        return EntryRows(read, self._shape(spot), dtype, self.budget, self.limits.get(name))

    def _shape(self, spot: _Spot) -> Shape:
        return self.planned.drafts[spot.entry.tensor].shape[len(spot.entry.index) :]

    def _structure(self, spot: _Spot, rows: int) -> Structure:
        moves = moves_into(spot.unit, spot.entry)
        atoms, names = tuple(move.target.slot for move in moves), _atom_names(spot.unit.row, len(moves))
        if len(atoms) < 2:
            atoms, names = self._fused(spot.entry.tensor, rows)
        heads, rotates = self._heads(spot.unit.row, len(atoms))
        return Structure(atoms, names, heads, rotates)

    def _fused(self, name: str, rows: int) -> tuple[tuple[Slot, ...], tuple[str, ...]]:
        """Atoms of a tensor that is carried over whole, by its torch_dist key."""
        q, k, d = (count_of(self.fields, f) for f in ("num_attention_heads", "num_query_groups", "kv_channels"))
        k = k or q
        if re.search(r"self_attention\.linear_qkv\.(weight|bias)$", name) and k and q and rows == (q + 2 * k) * d:
            return Pack(k, (q // k * d, d, d)).slots(), _QKV
        if ".linear_fc1." in name and self.fields.get("gated_linear_unit") and rows % 2 == 0:
            return Pack(1, (rows // 2, rows // 2)).slots(), _GLU
        return (), ()

    def _heads(self, row: str, num_atoms: int) -> tuple[Heads | None, tuple[int, ...] | None]:
        """The rotary heads of a parameter, and which of its atoms turn."""
        size = count_of(self.fields, "kv_channels")
        share = self.fields.get("model.rotary_percent", 1.0)
        rotary = int(size * share) if isinstance(share, int | float) else size
        if ".linear_qkv." in row and "layer_norm" not in row:
            return (Heads(size, rotary) if size else None), (0, 1) if num_atoms == 3 else None
        if re.search(r"\.(q_proj|k_proj|[qk]_norm|[qk]_layernorm)\.", row):
            return (Heads(size, rotary) if size else None), None
        nope, rope = count_of(self.fields, "qk_head_dim"), count_of(self.fields, "qk_pos_emb_head_dim")
        if rope and re.search(r"\.(linear_q_proj|linear_q_up_proj|q_b_proj)\.weight", row):
            return Heads(nope + rope, rope, nope), None
        if rope and re.search(r"\.(linear_kv_down_proj|kv_a_proj_with_mqa)\.weight", row):
            latent = count_of(self.fields, "kv_lora_rank")
            return Heads(latent + rope, rope, latent), None
        return None, None

    def _peers(self, spot: _Spot) -> Iterator[Peer]:
        """Entries of the same parameter in other layers and experts, nearest first, then others of this layer."""
        alike = [s for s in self.spots.values() if s.kind == spot.kind and s is not spot]
        alike = [s for s in alike if (s.layer == spot.layer) or (s.expert == spot.expert)]
        alike.sort(key=lambda s: (abs((s.layer or 0) - (spot.layer or 0)), abs((s.expert or 0) - (spot.expert or 0))))
        others = [
            s
            for s in self.spots.values()
            if (s.layer, s.expert) == (spot.layer, spot.expert)
            and s.kind != spot.kind
            and self._shape(s) == self._shape(spot)
        ]
        for other in (*alike[:_MOST_PEERS], *others[:_MOST_PEERS]):
            yield Peer(_described(spot, other), lambda other=other: self._peer_rows(spot, other))  # type: ignore[misc]

    def _peer_rows(self, spot: _Spot, other: _Spot) -> Rows:
        rows = self._expected(other, self.actual[spot.entry.tensor].dtype)
        rows.budget = 0  # a row or two tell most peers apart: reading them whole would cost a pass over the model
        return rows


def _described(spot: _Spot, other: _Spot) -> str:
    if other.kind != spot.kind:
        return f"the values of `{other.entry.tensor}`"
    if other.layer != spot.layer:
        off = (other.layer or 0) - (spot.layer or 0)
        return f"layer {other.layer}'s values in layer {spot.layer}'s place (off by {off:+d})"
    return f"expert {other.expert}'s values in expert {spot.expert}'s place: another order of experts"


_QKV, _GLU = ("query", "key", "value"), ("gate", "up")


def _atom_names(row: str, count: int) -> tuple[str, ...]:
    if count == 3 and "qkv" in row:
        return _QKV
    if count == 2 and ("fc1" in row or "gate_up" in row):
        return _GLU
    return tuple(f"part {number}" for number in range(1, count + 1))


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return None if match is None else int(next(group for group in match.groups() if group is not None))
