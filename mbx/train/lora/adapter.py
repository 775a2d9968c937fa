"""What every adapter is made of: its place on the base's rows, its parameters as Megatron Core marks them, its A."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from converters.errors import LayoutError, UnsupportedError
from converters.rows.ops import form as op_form
from mbx.train.lora.product import Layout, kind_of
from mbx.train.model.adapted import Linear
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig

COLUMN = ("ColumnParallelLinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear")
ROW = ("RowParallelLinear", "TERowParallelLinear")
GROUPED_COLUMN = ("TEColumnParallelGroupedLinear",)
GROUPED_ROW = ("TERowParallelGroupedLinear",)
ROUTERS = ("TopKRouter",)
#: Whole on every rank of tensor parallelism.
WHOLE = ("TELinear", *ROUTERS)
#: Ops whose repeats, query groups, are what tensor parallelism cuts; of others it cuts every atom.
_GROUPED = ("qkv", "qkv_fused", "qkv_own", "qgkv")


@dataclass(frozen=True, slots=True)
class Slots:
    """How the B's of a linear's adapters lie on its output rows on this rank.

    The rows are `groups` repeats of `stride`; `places` say, by B, where in a repeat its rows begin, how many they are,
    and of which part they are. `names` tell the B's apart: an atom's number, nothing for all atoms together. `ranks`
    and `scales` are by part; the A's of the parts lie below one another. `gated` says that all rows together are gate
    and up, which tensor parallelism cuts one by one.
    """

    groups: int
    stride: int
    places: tuple[tuple[int, int, int], ...]
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    gated: bool = False

    @property
    def rows(self) -> int:
        """Rows of the linear on this rank."""
        return self.groups * self.stride

    @property
    def width(self) -> int:
        """Rows of all A's."""
        return sum(self.ranks)

    def first(self, part: int) -> int:
        """Row at which a part's A begins."""
        return sum(self.ranks[:part])

    def layout(self) -> Layout:
        """The B's as blocks of one matrix `[rows, width]`."""
        blocks = tuple((row, size, self.first(part), self.ranks[part]) for row, size, part in self.places)
        return Layout(self.groups, self.stride, self.width, blocks)


def slots_of(linear: Linear, rows: int, cut: int, *, expert: bool = False) -> Slots:
    """Slots of a linear that has `rows` rows on each of the `cut` ranks that share them."""
    form = op_form(linear.op, linear.dims, rows * cut)
    grouped = linear.op in _GROUPED
    if grouped and form.mcore_groups % cut:
        raise LayoutError(f"tp {cut} does not divide the {form.mcore_groups} query groups, which adapters need")
    pack = form.mcore_pack()
    groups = pack.groups // cut if grouped else pack.groups
    sizes = pack.sizes if grouped else tuple(size // cut for size in pack.sizes)
    if groups * sum(sizes) != rows:
        raise UnsupportedError(f"a linear of op {linear.op} has {rows} rows, {groups * sum(sizes)} were expected")
    ranks, scales = (tuple(getattr(part, key) for part in linear.parts) for key in ("rank", "scale"))
    gated = linear.op in ("glu", "glu_fused", "glu_zip")
    # all atoms in one B where ranks then cut its rows as they are, or as halves
    halves = gated and not (expert and cut > 1)  # grouped experts have no entries of a checkpoint for halves
    if linear.together and (grouped or halves or len(sizes) == 1):
        return Slots(1, rows, ((0, rows, 0),), ("",), ranks, scales, gated)
    starts = {atom: sum(sizes[:n]) for n, atom in enumerate(form.order())}
    size_of = dict(zip(form.order(), sizes, strict=True))
    held = [(atom, number) for number, part in enumerate(linear.parts) for atom in part.atoms]
    places = tuple((starts[atom], size_of[atom], number) for atom, number in held)
    return Slots(groups, sum(sizes), places, tuple(str(atom) for atom, _ in held), ranks, scales)


class Adapter(nn.Module):
    """What adapters of one linear and of grouped experts share; `group` are the ranks of a cut.

    `scale` is alpha / r where all parts have the same, else 1, and A is multiplied by each part's own.
    """

    whole = dora = False

    def __init__(self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, expert: bool) -> None:
        super().__init__()
        self.base, self.slots, self.config, self.expert = base, slots, config, expert
        self.dropout, self.layout = lora.dropout, slots.layout()
        self.cuts: dict[str, int | None] = {}
        self.scale = slots.scales[0] if len(set(slots.scales)) == 1 else 1.0
        self.row_parallel, self.group = kind_of(base) in (*ROW, *GROUPED_ROW), group_of(expert)
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
        own = cut is not None or (self.expert and self.tp == 1)
        set_tensor_model_parallel_attributes(parameter, own, cut or 0, 1)
        if hasattr(self.weight, "allreduce"):  # False under expert parallelism: gradients of other ranks' experts
            parameter.allreduce = self.weight.allreduce  # type: ignore[attr-defined]
        if cut is None and self.sequence_parallel and not self.expert:  # of experts `_summed` adds them already
            parameter.sequence_parallel = True  # type: ignore[attr-defined]  # each rank sees its tokens: sum gradients
        return parameter

    def factors(self, kind: str = "b") -> list[nn.Parameter]:
        """The B's (or, for "m", DoRA's magnitudes) in the order of the slots' places."""
        return [self.get_parameter(f"lora_{kind}{name}") for name in self.slots.names]

    def scale_of(self, name: str) -> float:
        """What the product of a B, named as its parameter is, is multiplied by: alpha / r, or alpha / √r."""
        _, _, part = self.slots.places[self.slots.names.index(name.removeprefix("lora_b"))]
        return self.slots.scales[part]

    def _summed(self, parameter: torch.Tensor) -> torch.Tensor:
        """A factor that ranks share whose products are each a part: its gradients are summed over them.

        Experts that are cut over ranks: their tokens are gathered before them and their outputs summed behind them,
        outside of the linears (megatron/core/transformer/moe/token_dispatcher.py).
        """
        if not (self.expert and self.tp > 1):
            return parameter
        from mbx.models.megatron.core.groups import mappings

        shared = mappings.copy_to_tensor_model_parallel_region(parameter, group=self.group)
        assert isinstance(shared, torch.Tensor)
        return shared

    def _a(self, a: torch.Tensor) -> torch.Tensor:
        """A as it is multiplied: each part by its own scale where they differ."""
        if not self.row_parallel:
            a = self._summed(a)
        if len(set(self.slots.scales)) > 1:
            ones = [
                a.new_full((rank,), scale) for rank, scale in zip(self.slots.ranks, self.slots.scales, strict=True)
            ]
            a = a * torch.cat(ones)[:, None]
        return a

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        from mbx.models.megatron.core.groups import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

        if self.expert and self.tp == 1:
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
    """A's of all parts, uniform in ±1/√in as PEFT draws it (Kaiming, a = √5): [rows, in], the same for every layout.

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
