"""Rows of several files in given shares, spread evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mbx.train.data.rows import Examples, Row, Stream


@dataclass(frozen=True)  # no slots: the order of an epoch is made once
class Mixture:
    """Rows of `parts`, each by its share of `weights`, which sum to 1.

    An epoch has as many rows as the parts have together, and its first rows, however many, hold each part's share to a
    row. A part goes on where it was in the next epoch, so that it is gone through whole, and shuffled anew, before any
    of its rows comes again. Which row is the run's i-th depends on the rows of the parts and the weights alone.
    """

    parts: Sequence[Examples | Stream]
    weights: Sequence[float]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows that each part has in an epoch: its share, and one at least."""
        total = sum(part.count for part in self.parts)
        return tuple(max(1, round(weight * total)) for weight in self.weights)

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts)

    @cached_property
    def _order(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each row of an epoch: its part, and which of the part's it is."""
        part = np.repeat(np.arange(len(self.parts)), self.counts)
        within = np.concatenate([np.arange(count) for count in self.counts])
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        order = np.argsort(places, kind="stable")
        return part[order], within[order]

    def row(self, index: int) -> Row:
        """Row `index` of the run."""
        epoch, at = divmod(index, self.count)
        part, within = self._order
        number = int(part[at])
        return self.parts[number].row(epoch * self.counts[number] + int(within[at]))
