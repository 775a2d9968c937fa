"""What adapters of one linear share, whatever they compute: the base's product, values over its rows or columns, and
the checkpoint's entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mbx.train.lora.adapter import WHOLE, Adapter, Slots
from mbx.train.lora.product import kind_of
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.config import TransformerConfig


class LinearAdapter(Adapter):
    """A frozen Megatron Core linear and what is trained on it; `adapted` is what both compute.

    Trained parameters are called `lora_NAME`, an atom's number behind it where they are of an atom's rows: by this
    mark checkpoints of a run tell them from the base.
    """

    def __init__(
        self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, expert: bool = False
    ) -> None:
        super().__init__(base, lora, slots, config, expert)
        self.whole = kind_of(base) in WHOLE
        # a fused norm hides the input of the product; Transformer Engine hands it out on request
        self.fused_norm = hasattr(base, "return_layernorm_output")
        if self.fused_norm:
            base.return_layernorm_output = True  # type: ignore[assignment]

    @property
    def row_cut(self) -> int | None:
        """The dimension by which values of the base's rows are cut over ranks; None where each has all."""
        return None if self.row_parallel or self.whole else 0

    def forward(self, x: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The adapted output, and the base's bias where the caller adds it; a norm behind the product comes last."""
        y, bias = self.adapted(x, arguments)
        if (behind := getattr(self.base, "behind", None)) is None:
            return y, bias
        normed_y: torch.Tensor
        normed_y, bias = behind(y, bias)
        return normed_y, bias

    def adapted(self, x: torch.Tensor, arguments: tuple[object, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output with what is trained in it, and the bias that the caller adds; x: [s, b, in]."""
        raise NotImplementedError

    def run_base(
        self, x: torch.Tensor, arguments: tuple[object, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The base's output without a norm behind it, its deferred bias, and the input that was multiplied."""
        result = getattr(self.base, "product", self.base)(x, *arguments)
        if not self.fused_norm:
            return result[0], result[1], x
        if len(result) == 3:  # (y, bias, normed)
            return result[0], result[1], result[2]
        (y, normed), bias = result
        return y, bias, normed

    def add(self, name: str, value: torch.Tensor, cut: int | None) -> None:
        """Train `value` as `lora_{name}`, which ranks hold cut by the dimension `cut`, or all alike."""
        self.cuts[f"lora_{name}"] = cut
        self.register_parameter(f"lora_{name}", self._own(value, cut))

    def over_rows(self, name: str, otherwise: torch.Tensor) -> torch.Tensor:
        """Values of the base's rows on this rank, [rows]: those of `lora_{name}`, and `otherwise` [rows] where a row
        is adapted by no part."""
        slots, owned = self.slots, self.factors(name)
        if sum(size for _, size, _ in slots.places) == slots.stride:
            joined = owned[0].new_empty(slots.groups, slots.stride)
        else:
            joined = otherwise.to(owned[0].dtype).view(slots.groups, slots.stride).clone()
        for values, (row, size, _) in zip(owned, slots.places, strict=True):
            joined[:, row : row + size] = values.view(slots.groups, size)
        return self._summed(joined.view(-1)) if self.row_parallel else joined.view(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: object = None
    ) -> dict[str, object]:
        """The base under its own keys, so that any checkpoint of the model fits; what is trained beside it."""
        from mbx.models.megatron.core.sharding import (
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
        )

        known = ensure_metadata_has_dp_cp_group(metadata)
        base = self.base.sharded_state_dict(prefix, sharded_offsets, known)  # type: ignore[operator]
        made: dict[str, object] = make_sharded_tensors_for_checkpoint(
            dict(self.named_parameters(recurse=False)),
            prefix,
            {name: cut for name, cut in self.cuts.items() if cut is not None},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=known["dp_cp_group"],
        )
        return {**base, **made}
