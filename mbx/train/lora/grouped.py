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
from mbx.train.lora.layer import Adapter, Slots, cut_gated, first_factor
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig


class LoraGrouped(Adapter):
    """Frozen grouped experts and their adapters; `seeds` draw each expert's A.

    `lora_a`: [experts, atoms · r, in]; `lora_b{i}`: [experts, rows of atom i, r]; whole, as the experts are
    (`parallel.etp` is 1). Raises UnsupportedError for DoRA.
    """

    def __init__(
        self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seeds: Sequence[int]
    ) -> None:
        super().__init__(base, lora, slots, config, expert=True)
        if lora.dora:
            raise UnsupportedError("DoRA on grouped experts is not supported", hint="lora.dora=false")
        weight, rows = self.weight, slots.atoms * lora.rank
        self.lora_a = self._own(torch.stack([first_factor(weight, rows, seed, None) for seed in seeds]), None)
        for atom in range(slots.atoms):
            b = torch.zeros(len(seeds), slots.rows(atom), lora.rank, dtype=weight.dtype, device=weight.device)
            self.register_parameter(f"lora_b{atom}", self._own(b, None))

    def forward(
        self, x: torch.Tensor, m_splits: Sequence[int] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output with the adapters' added. x: [tokens, in], the first `m_splits[0]` of the first expert."""
        y, bias = self.base(x, m_splits)
        counts = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
        factors = [self.b(i) for i in range(self.slots.atoms)]
        parts = []
        for expert, tokens in enumerate(torch.split(self._drop(x), counts)):
            ranks = torch.chunk(F.linear(tokens, self.lora_a[expert]), self.slots.atoms, dim=1)
            parts.append(torch.cat([F.linear(h, b[expert]) for h, b in zip(ranks, factors, strict=True)], dim=1))
        return torch.add(y, torch.cat(parts), alpha=self.scale), bias

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
        axis, own = len(sharded_offsets), dict(self.named_parameters(recurse=False))
        local = len(self.lora_a)
        if self.slots.gated:
            for i in range(local):
                offsets = (*sharded_offsets, (axis, rank * local + i, ep * local))
                cut_gated(content, [f"{prefix}weight{i}", f"{prefix}bias{i}"], offsets)
        made: dict[str, object] = {f"{prefix}base.{key[len(prefix) :]}": value for key, value in content.items()}
        copies = parallel_state.get_expert_data_parallel_rank()
        for name, parameter in own.items():
            made[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *sharded_offsets,
                (axis, rank, ep),
                replica_id=(0, 0, copies),
                prepend_axis_num=axis,
            )
        return made
