"""What every adapter is made of: its place on the base's rows, its parameters as Megatron Core marks them, its A."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from converters.rows.pack import Pack
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig

COLUMN = ("ColumnParallelLinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear")
ROW = ("RowParallelLinear", "TERowParallelLinear")
GROUPED_COLUMN = ("TEColumnParallelGroupedLinear",)
GROUPED_ROW = ("TERowParallelGroupedLinear",)
#: Whole on every rank of tensor parallelism.
WHOLE = ("TELinear",)


@dataclass(frozen=True, slots=True)
class Slots:
    """How an adapter's atoms share the base's output rows on this rank: a Pack of `groups` repeats of `sizes`.

    `gated` says that the rows are gate and up, which tensor parallelism cuts one by one.
    """

    pack: Pack
    gated: bool = False

    @property
    def atoms(self) -> int:
        """Number of atoms."""
        return len(self.pack.sizes)

    def rows(self, atom: int) -> int:
        """Rows of one atom on this rank."""
        return self.pack.groups * self.pack.sizes[atom]


class Adapter(nn.Module):
    """What adapters of one linear and of grouped experts share: `scale` is alpha / r, `group` the ranks of a cut."""

    whole = dora = False

    def __init__(self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, expert: bool) -> None:
        super().__init__()
        self.base, self.slots, self.config, self.expert = base, slots, config, expert
        self.rank, self.scale, self.dropout = lora.rank, lora.alpha / lora.rank, lora.dropout
        self.row_parallel, self.group = type(base).__name__ in (*ROW, *GROUPED_ROW), group_of(expert)
        self.tp = self.group.size()
        self.sequence_parallel = self.tp > 1 and config.sequence_parallel

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight; of grouped experts the first's."""
        weight = self.base.weight0 if hasattr(self.base, "weight0") else self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def _own(self, value: torch.Tensor, cut: int | None) -> nn.Parameter:
        """A trainable parameter, marked as Megatron Core marks its own."""
        from mbx.models.megatron.core.groups import set_tensor_model_parallel_attributes

        parameter = nn.Parameter(value)
        # of an expert: ranks of tensor parallelism hold other experts, so each counts towards the gradient's norm
        set_tensor_model_parallel_attributes(parameter, cut is not None or self.expert, cut or 0, 1)
        if hasattr(self.weight, "allreduce"):  # False under expert parallelism: gradients of other ranks' experts
            parameter.allreduce = self.weight.allreduce  # type: ignore[attr-defined]
        if cut is None and self.sequence_parallel:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]  # each rank sees its tokens: sum gradients
        return parameter

    def b(self, atom: int) -> nn.Parameter:
        """B of one atom."""
        return self.get_parameter(f"lora_b{atom}")

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        from mbx.models.megatron.core.groups import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

        if self.expert:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                return F.dropout(x, self.dropout)
        if self.row_parallel or self.sequence_parallel:  # each rank holds other values: other masks
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)


def group_of(expert: bool) -> torch.distributed.ProcessGroup:
    """The ranks that a linear is cut over."""
    from mbx.models.megatron.core.groups import parallel_state

    found = (
        parallel_state.get_expert_tensor_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    assert found is not None
    return found  # type: ignore[no-any-return]


def first_factor(
    weight: torch.Tensor, rows: int, seed: int, cut_over: torch.distributed.ProcessGroup | None
) -> torch.Tensor:
    """A, uniform in ±1/√in as PEFT draws it (Kaiming, a = √5), the same for every parallel layout: [rows, in].

    `cut_over` are the ranks that share its columns, None where each has all.
    """
    tp = 1 if cut_over is None else cut_over.size()
    inputs = weight.shape[1] * tp
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(inputs)
    whole = torch.empty(rows, inputs).uniform_(-bound, bound, generator=generator)
    if cut_over is not None and tp > 1:
        first = cut_over.rank() * weight.shape[1]
        whole = whole[:, first : first + weight.shape[1]]
    return whole.to(device=weight.device, dtype=weight.dtype).contiguous()
