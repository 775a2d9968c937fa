"""What a rank holds of a tensor under its Hugging Face name: a box, and the live memory of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.engine.boxes import Index, sizes_of
from converters.tensors import Shape
from converters.torch_casts import TORCH_DTYPES
from mbx.live.moves import assign


@dataclass(frozen=True, slots=True)
class Held:
    """Elements of the tensor `name` that this rank holds: `tensor[index]`, of which `view` is the live memory.

    Views have the model's dtype and, where Megatron Core keeps a norm's gamma otherwise, its values less `shift`;
    `values` and `fill` convert. Another rank owns what is a `replica` here.
    """

    name: str
    index: Index
    view: torch.Tensor
    replica: bool
    dtype: str
    shift: int = 0

    @property
    def offsets(self) -> Shape:
        """The first element in each dimension."""
        return tuple(part.start for part in self.index)

    @property
    def sizes(self) -> Shape:
        """Elements in each dimension; `steps` apart."""
        return sizes_of(self.index)

    @property
    def steps(self) -> Shape:
        """How far apart the elements of a dimension lie in the tensor: 1 but for interleaved rows."""
        return tuple(part.step for part in self.index)

    def values(self) -> torch.Tensor:
        """The values as the folder has them; the view itself where it has them so."""
        dtype = TORCH_DTYPES[self.dtype]
        if not self.shift and self.view.dtype == dtype:
            return self.view
        out = torch.empty(self.view.shape, dtype=dtype, device=self.view.device)
        assign(out, self.view, self.shift)
        return out

    def fill(self, values: torch.Tensor) -> None:
        """Write values, as the folder has them, into the model."""
        assign(self.view, values, -self.shift)
