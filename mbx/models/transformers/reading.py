"""How a folder is read for a comparison where it is not read as it is: with changes that both sides undergo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converters.rows.expr import Value

if TYPE_CHECKING:
    import torch

    from converters.tensors import StoredTensor


@dataclass(frozen=True, slots=True)
class FolderReading:
    """`settings` replace those of the text model's config, by Transformers' names.

    `casts` are declared ones: by a tensor's stored name the dtype that its values are rounded to, and what is added
    before (a norm that the other side stores as 1 + gamma is rounded as that).
    """

    settings: Mapping[str, Value] = field(default_factory=dict)
    casts: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def rounded(self, stored: StoredTensor, values: torch.Tensor) -> torch.Tensor:
        """`values` of `stored`, as the declared cast leaves them; in fp32 where it has one."""
        if stored.name not in self.casts:
            return values
        from converters.torch_casts import TORCH_DTYPES

        dtype, shift = self.casts[stored.name]
        return (values.float() + shift).to(TORCH_DTYPES[dtype]).float() - shift


#: A folder as it is.
AS_IT_IS = FolderReading()
