"""Adapters on grouped experts: one A and one set of B's for each expert that this rank holds.

`TEGroupedMLP` computes all of a rank's experts in one call on tokens sorted by expert. The adapter's parameters have
the expert as first dimension, so that a checkpoint holds the same tensors as one of sequential experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from converters.errors import UnsupportedError
from mbx.train.lora.adapter import Adapter, Slots, first_factor
from mbx.train.lora.product import joined_factors
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig
    from mbx.models.megatron.core.experts import Ends


class LoraGrouped(Adapter):
    """Frozen grouped experts and their adapters; `seeds` draw each expert's A.

    `lora_a`: [experts, Σ r, in]; `lora_b{i}`: [experts, rows of atom i, r], or `lora_b` of all rows; cut over ranks as
    the experts are. Raises UnsupportedError for DoRA.
    """

    def __init__(
        self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seeds: Sequence[int]
    ) -> None:
        super().__init__(base, lora, slots, config, expert=True)
        if lora.dora:
            raise UnsupportedError("DoRA on grouped experts is not supported", hint="lora.dora=false")
        weight, cut = self.weight, self.group if self.row_parallel else None
        a = torch.stack([first_factor(weight, slots.width, seed, cut) for seed in seeds])
        self.lora_a = self._own(a, 2 if self.row_parallel else None)
        for name, (_, size, part) in zip(slots.names, slots.places, strict=True):
            rank = slots.ranks[part]
            b = torch.zeros(len(seeds), slots.groups * size, rank, dtype=weight.dtype, device=weight.device)
            self.register_parameter(f"lora_b{name}", self._own(b, None if self.row_parallel else 1))

    def forward(
        self, x: torch.Tensor, m_splits: Sequence[int] | torch.Tensor | Ends
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output with the adapters' added. x: [tokens, in], the first `m_splits[0]` of the first expert."""
        y, bias = self.base(x, m_splits)
        if not isinstance(m_splits, Sequence | torch.Tensor):
            return self._joined(y, x, m_splits), bias
        counts = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
        a, factors = self._a(self.lora_a), self.factors()
        if self.row_parallel:
            factors = [self._summed(b) for b in factors]  # type: ignore[misc]
        parts = []
        for expert, tokens in enumerate(torch.split(self._drop(x), counts)):
            b = joined_factors([every[expert] for every in factors], self.layout)
            parts.append(F.linear(F.linear(tokens, a[expert]), b))
        return torch.add(y, torch.cat(parts), alpha=self.scale), bias

    def _joined(self, y: torch.Tensor, x: torch.Tensor, ends: Ends) -> torch.Tensor:
        """The same in one product for all experts' A and one for their B."""
        from mbx.models.megatron.core.experts import grouped

        h = grouped(self._drop(x), self._a(self.lora_a), ends)
        return torch.add(y, grouped(h, joined_factors(self.factors(), self.layout), ends), alpha=self.scale)

    def backward_dw(self) -> None:
        """Nothing: the base is frozen."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: object = None
    ) -> dict[str, object]:
        """The base under its own keys; the adapters beside it, experts a dimension behind the layers."""
        from mbx.models.megatron.core.groups import parallel_state
        from mbx.models.megatron.core.sharding import ShardedTensor

        content = self.base.sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[operator]
        ep, rank = (
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_rank(),
        )
        axis, copies = len(sharded_offsets), parallel_state.get_expert_data_parallel_rank()
        here, ranks = self.group.rank(), self.group.size()
        for name, parameter in self.named_parameters(recurse=False):
            dim = (2 if self.row_parallel else None) if name == "lora_a" else (None if self.row_parallel else 1)
            cut = () if dim is None else ((axis + dim, here, ranks),)
            content[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *sharded_offsets,
                (axis, rank, ep),
                *cut,
                replica_id=(0, here if dim is None else 0, copies),
                prepend_axis_num=axis,
            )
        return content  # type: ignore[no-any-return]
