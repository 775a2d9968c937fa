"""Along which width each dimension of a parameter runs: the one that it grows with.

A table's ops say how many rows an atom has at given dims, and `converters.rows.shapes` what shape a parameter has at a
config. So nothing new is declared: double a width, and look which dimensions doubled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from converters.engine.plan import row_form
from converters.errors import UnsupportedError
from converters.planning.join import Joiner
from converters.rows.expr import Env
from converters.rows.shapes import expected_shape
from converters.rows.table import Row
from converters.tensors import Shape


@dataclass(frozen=True, slots=True)
class Axes:
    """The width that each atom's rows run along, and the columns; None for what no pruned width changes."""

    atoms: tuple[str | None, ...]
    columns: str | None = None


def axes_of(row: Row, joiner: Joiner, widths: Collection[str]) -> Axes:
    """Along which of `widths` the parameter of a row runs; UnsupportedError where that is not known of it."""
    atoms, columns = _sizes(row, joiner, joiner.env)
    found: list[str | None] = [None] * len(atoms)
    across: str | None = None
    for width in widths:
        count = joiner.env[width]
        assert isinstance(count, int)
        more, wider = _sizes(row, joiner, {**joiner.env, width: 2 * count})
        for number, (before, after) in enumerate(zip(atoms, more, strict=True)):
            if after != before:
                if found[number] is not None or before % count:
                    raise _unknown(row)
                found[number] = width
        if wider != columns:
            if across is not None or columns is None or columns % count:
                raise _unknown(row)
            across = width
    return Axes(tuple(found), across)


def _sizes(row: Row, joiner: Joiner, env: Env) -> tuple[Shape, int | None]:
    """Rows of each atom and columns of a row's parameter at the fields `env`; None where it has no columns."""
    dims = joiner.table.dims_at(env)
    if env.get("kv_channels") is None:  # a table whose config.json has no width of a head works it out
        env = {**env, "kv_channels": dims.get("head_dim")}
    shape = expected_shape(row, env)
    if shape is None:
        raise _unknown(row)
    columns = shape[1] if len(shape) > 1 else None
    if len(shape) > 1 and columns is None:
        raise _unknown(row)
    if row.same_as is not None:  # repeats a vocabulary, whose rows stay
        return (1,), columns
    atoms = row_form(row, dims, shape[0] or 0).atoms
    if not sum(atoms):  # an op that takes its rows as they are, and nothing says how many those are
        raise _unknown(row)
    return atoms, columns


def _unknown(row: Row) -> UnsupportedError:
    return UnsupportedError(
        f"`{row.mcore}` (op {row.spec.op}): which width its dimensions run along is not known, so no width is pruned",
        hint="layers of this model can be pruned all the same",
        details=row.hf,
    )
