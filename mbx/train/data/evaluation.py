"""Validation rows: one pass over a whole file, whatever the batch and the number of processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mbx.train.data.rows import Examples, Row, Rows, Stream


@dataclass(frozen=True, slots=True)
class OnePass:
    """The first `count` of `rows`, then `rest`, if there is one; behind them rows that weigh nothing, without end."""

    rows: Rows
    count: int
    rest: Row | None = None

    @property
    def total(self) -> int:
        """Rows that are looked at."""
        return self.count + (self.rest is not None)

    def row(self, index: int) -> Row:
        """Row `index`; one behind the last fills a batch and has no token to learn."""
        if index < self.count:
            return self.rows.row(index)
        if index == self.count and self.rest is not None:
            return self.rest
        first = self.rows.row(0)
        return replace(first, mask=np.zeros_like(first.mask))

    def batch(self, asked: int, unit: int) -> int:
        """Rows of a batch: as many as `asked`, or as the pass has, in a multiple of the `unit` that ranks share."""
        return -(-min(asked, self.total) // unit) * unit


def one_pass(rows: Rows, endless: int) -> OnePass:
    """Every row of a file, once; of rows without an end, as Megatron Core's datasets are, the first `endless`."""
    if isinstance(rows, Examples):
        return OnePass(rows, rows.count)
    if isinstance(rows, Stream):
        return OnePass(rows, rows.count, rows.rest())
    return OnePass(rows, endless)
