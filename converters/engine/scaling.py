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


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """Rows `divided` by a value each, columns `multiplied` by one: (x + before) / divided · multiplied + after."""

    divided: Vector | None = None
    multiplied: Vector | None = None
    before: int = 0
    after: int = 0

    def scratch_bytes(self, rows: int, cols: int) -> int:
        """The values in fp32, and once more as they are cast."""
        return 12 * rows * cols

    def identity(self) -> str:
        """Digests of the factors."""
        return f"scaled {_digest(self.divided)} {_digest(self.multiplied)} {self.before} {self.after}"

    def apply(self, factors: Factors, data: Bytes, row: int, source: str, target: str) -> Bytes:
        """Rows of a target's matrix from `row` on, scaled and cast from dtype `source` to `target`."""
        import torch

        from converters.torch_casts import TORCH_DTYPES

        stored = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(TORCH_DTYPES[source])
        values = stored.reshape(len(data), -1).to(torch.float32, copy=True)
        if self.before:
            values += self.before
        if self.divided is not None:
            values /= torch.from_numpy(self.divided[row : row + len(values)]).unsqueeze(1)
        if self.multiplied is not None:
            values *= torch.from_numpy(self.multiplied)
        if self.after:
            values += self.after
        out: Bytes = values.to(TORCH_DTYPES[target]).reshape(-1).view(torch.uint8).numpy()
        return out.reshape(len(data), -1)


def _digest(values: Vector | None) -> str:
    return "" if values is None else sha256(values.tobytes()).hexdigest()
