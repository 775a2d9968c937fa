"""Where a scale of channels can stand in a model: divided out where they are made, multiplied in where they are used.

Which parameter of Megatron Core makes the channels of which is what its modules say (megatron/core/transformer:
attention.py, mlp.py, moe/, multi_latent_attention.py); a `…layer_norm_weight` is of the norm that its product fuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from converters.codecs.calibration import Calibration, Vector
from converters.engine.plan import Plan
from converters.engine.scaling import Scaled
from converters.errors import UsageError
from converters.rows.expr import Env
from converters.rows.row import Row
from converters.rows.table import Table
from converters.tensors import Shape

#: Norms that stand apart from the products behind them.
_BEHIND: Mapping[str, tuple[str, ...]] = {
    "input_layernorm.weight": (
        "self_attention.linear_q_proj.weight",
        "self_attention.linear_q_down_proj.weight",
        "self_attention.linear_kv_down_proj.weight",
    ),
    "pre_mlp_layernorm.weight": (
        "mlp.router.weight",
        "mlp.experts.linear_fc1.weight{E}",
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.gate_weight",
    ),
}
_FUSED = "layer_norm_weight"
#: Products that make channels by their last tensor of several, and those that take them in.
_PAIRS = {
    "self_attention.linear_qkv.weight": "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight": "mlp.linear_fc2.weight",
    "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.experts.linear_fc1.weight{E}": "mlp.experts.linear_fc2.weight{E}",
}
_ATTENTION = "self_attention.linear_qkv.weight"
#: Ops whose last tensor makes what the next product takes in, value by value.
_LAST_ALONE = frozenset(("glu", "qkv", "qgkv", "qkv_own"))


@dataclass(frozen=True, slots=True)
class Fold:
    """One scale: values of the tensors `divided` are divided by it row by row, columns of all tensors of the rows
    `users` multiplied. It is recorded under the first of `divided`, and of the `kind` that its parameter is.

    A norm's tensor stores its values less `offset`. Of attention `heads` is set: users have them all, what is divided
    those of a group.
    """

    kind: str
    divided: tuple[str, ...]
    users: tuple[Row, ...]
    offset: int = 0
    heads: int | None = None

    @property
    def name(self) -> str:
        """The tensor under which the scale is recorded."""
        return self.divided[0]

    def spread(self, scale: Vector, columns: int) -> Vector:
        """The scale of each of a user's `columns`: heads of a group share theirs."""
        if self.heads is None or len(scale) == columns:
            return scale
        size = columns // self.heads
        repeats = columns // len(scale)
        out: Vector = np.repeat(scale.reshape(-1, 1, size), repeats, axis=1).reshape(-1)
        return out

    def gathered(self, values: Vector, rows: int) -> Vector:
        """Of a value for each column of a user the mean over the heads that share a scale: [rows]."""
        if self.heads is None or len(values) == rows:
            return values
        size = len(values) // self.heads
        out: Vector = values.reshape(-1, len(values) // rows, size).mean(axis=1).reshape(-1)
        return out


def folds_of(rows: Sequence[Row], fields: Env) -> Iterator[Fold]:
    """The folds within one decoder layer, of the `rows` that it has."""
    held = {(row.spec.param, row.expert): row for row in rows}
    zero = int(bool(fields.get("layernorm_zero_centered_gamma")))
    for (param, expert), row in held.items():
        bias = held.get((_bias(param), expert))
        if row.spec.op == "norm":
            users = tuple(one for one in rows if one.spec.param in _behind(param))
            made = (row.hf[0], *(() if bias is None else bias.hf))
            yield from _kept(Fold(param, made, users, row.spec.shift + zero))
        elif param in _PAIRS and row.spec.op in _LAST_ALONE and (user := held.get((_PAIRS[param], expert))):
            made = (row.hf[-1], *(() if bias is None else bias.hf[-1:]))
            heads = fields.get("num_attention_heads") if param == _ATTENTION else None
            yield from _kept(Fold(param, made, (user,), heads=heads if isinstance(heads, int) else None))


def _behind(norm: str) -> tuple[str, ...]:
    return _BEHIND.get(norm) or ((norm.replace(_FUSED, "weight"),) if norm.endswith(_FUSED) else ())


def _bias(param: str) -> str:
    return param.replace("layer_norm_weight", "layer_norm_bias").replace("weight", "bias")


def _kept(fold: Fold) -> Iterator[Fold]:
    """The fold, where every user is stored as matrices of their own with the inputs last."""
    if fold.users and not any(row.spec.transpose or row.spec.stacked for row in fold.users):
        yield fold


def folds_in(table: Table, env: Env, present: Mapping[str, object] | None, keys: Mapping[str, object]) -> list[Fold]:
    """The folds of a model whose tensors are `keys`, under the names of a folder that holds `present`."""
    layers: dict[int, list[Row]] = {}
    for row in table.expand(env, present, keys):
        if row.layer is not None and not row.spec.drop and "mtp." not in row.site:
            layers.setdefault(row.layer, []).append(row)
    return [fold for rows in layers.values() for fold in folds_of(rows, env)]


def changes_of(
    plan: Plan, folds: Sequence[Fold], calibration: Calibration, encoded: Collection[str] | None = None
) -> dict[str, Scaled]:
    """What the scales of `calibration` change in each tensor of an export's `plan`, all of which are plain yet.

    Where tensors to be `encoded` are given, only those that one of them is multiplied by. Raises UsageError for scales
    that are of no fold of this model.
    """
    whole = {(entry.tensor, entry.index, entry.fold): unit.shift for unit in plan.units for entry in unit.entries}
    shapes = {draft.name: draft.shape for draft in plan.drafts if (draft.name, (), 1) in whole}
    changes: dict[str, Scaled] = {}
    known = [fold for fold in folds if fold.name in calibration.scales]
    for fold in serving(known, encoded):
        scale = calibration.scales[fold.name]
        for name in fold.divided:
            _check(name, shapes.get(name, ())[:1], scale)
            offset = fold.offset if name == fold.name else 0
            # as Megatron Core stores it, a value is less by the shift than as the folder does
            before = offset + whole[name, (), 1]
            changes[name] = replace(changes.get(name, Scaled()), divided=scale, before=before, after=-offset)
        for name in (name for user in fold.users for name in user.hf):
            columns = shapes.get(name, ())[1:]
            factor = fold.spread(scale, *columns) if len(columns) == 1 else scale
            _check(name, columns, factor)
            changes[name] = replace(changes.get(name, Scaled()), multiplied=factor)
    for name in sorted(calibration.scales.keys() - {fold.name for fold in known})[:1]:
        _check(name, (), calibration.scales[name])
    return changes


def serving(folds: Sequence[Fold], encoded: Collection[str] | None) -> list[Fold]:
    """The folds some user of which is `encoded`; all of them for None."""
    return [
        fold for fold in folds if encoded is None or any(name in encoded for user in fold.users for name in user.hf)
    ]


def _check(name: str, size: Shape, scale: Vector) -> None:
    if size != scale.shape:
        raise UsageError(
            f"the calibration has a scale of {len(scale)} channels for `{name}`, which has {list(size) or 'none'}",
            hint="it is of another model: `mbx calibrate SRC DATA` measures this one",
        )
