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
from mbx.train.lora.layer import Slots, cut_gated, first_factor, group_of
from mbx.train.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig

GROUPED_COLUMN = ("TEColumnParallelGroupedLinear",)
GROUPED_ROW = ("TERowParallelGroupedLinear",)


class LoraGrouped(nn.Module):
    """Frozen grouped experts and their adapters; `seeds` draw each expert's A.

    `lora_a`: [experts, atoms · r, in]; `lora_b{i}`: [experts, rows of atom i, r]; whole, as the experts are
    (`parallel.etp` is 1). Raises UnsupportedError for DoRA.
    """

    def __init__(
        self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seeds: Sequence[int]
    ) -> None:
        super().__init__()
        if lora.dora:
            raise UnsupportedError("DoRA on grouped experts is not supported", hint="lora.dora=false")
        self.base, self.slots, self.config = base, slots, config
        self.rank, self.scale, self.dropout = lora.rank, lora.alpha / lora.rank, lora.dropout
        self.row_parallel, self.group = type(base).__name__ in GROUPED_ROW, group_of(True)
        weight = base.weight0
        assert isinstance(weight, torch.Tensor)
        rows = slots.atoms * lora.rank
        self.lora_a = self._own(torch.stack([first_factor(weight, rows, seed, None) for seed in seeds]))
        for atom in range(slots.atoms):
            b = torch.zeros(len(seeds), slots.rows(atom), lora.rank, dtype=weight.dtype, device=weight.device)
            self.register_parameter(f"lora_b{atom}", self._own(b))

    def _own(self, value: torch.Tensor) -> nn.Parameter:
        from mbx.models.megatron.core.groups import set_tensor_model_parallel_attributes

        parameter = nn.Parameter(value)
        # ranks of tensor parallelism hold other experts, so each counts towards the gradient's norm
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if hasattr(self.base.weight0, "allreduce"):
            parameter.allreduce = self.base.weight0.allreduce  # type: ignore[attr-defined]
        return parameter

    def b(self, atom: int) -> nn.Parameter:
        """B's of one atom."""
        return self.get_parameter(f"lora_b{atom}")

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

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        from mbx.models.megatron.core.groups import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return F.dropout(x, self.dropout)

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
