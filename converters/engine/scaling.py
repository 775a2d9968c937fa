"""Values of a target that no adapter changes, but a calibration: given ones, and rows and columns times a factor."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from converters.engine.lowrank import Factors

Bytes = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]


class Update(Protocol):
    """What changes the values of one entry of a target, in fp32, as it is written."""

    def scratch_bytes(self, rows: int, cols: int) -> int:
        """Memory that `apply` takes for `rows` rows of `cols` columns."""

    def identity(self) -> str:
        """Everything that decides what `apply` makes, as text."""

    def apply(self, factors: Factors, data: Bytes, row: int, source: str, target: str) -> Bytes:
        """Rows of the target's matrix from `row` on, changed and cast from dtype `source` to `target`.

        data: [rows, bytes of a row], of dtype `source`; the result has its rows.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """An entry of fp32 `values` that no source holds."""

    values: Vector

    def scratch_bytes(self, rows: int, cols: int) -> int:
        """Of `values`, nothing more."""
        return 0

    def identity(self) -> str:
        """The values' digest."""
        return f"given {_digest(self.values)}"

    def apply(self, factors: Factors, data: Bytes, row: int, source: str, target: str) -> Bytes:
        """`values` from `row` on, whatever `data` are."""
        if target != "F32":
            raise AssertionError(f"given values are F32, not {target}")
        return self.values[row : row + len(data)].view(np.uint8).reshape(len(data), -1)


def _digest(values: Vector | None) -> str:
    return "" if values is None else sha256(values.tobytes()).hexdigest()
