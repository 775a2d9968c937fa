"""The adapter of one linear: its factors, the product, what tensor parallelism asks of them, its checkpoint entries.

A linear `y = W x` becomes `y = W x + s · B A x` (arXiv 2106.09685). `linear_qkv` holds the atoms q, k and v, a gated
`linear_fc1` gate and up, a gated delta net's `in_proj` six; what Transformers holds in one tensor has an A of its own,
so an adapter is exactly PEFT's. The A's lie stacked in one parameter; each atom has a B, and these are joined, in the
row order Megatron Core gives the atoms, for one product. Where ranks cut all rows of a tensor alike, it has one B.

Tensor parallelism. Column-parallel base: A whole on every rank, B cut by rows. Row-parallel base: A cut by columns, B
whole. Between A and B lies a tensor of few columns, and that is what is communicated, not the activations. Of experts
that are cut over ranks (`parallel.etp`), nothing is communicated but the gradient of the factor that all ranks hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mbx.train.lora.adapter import Slots, first_factor
from mbx.train.lora.linear import LinearAdapter
from mbx.train.lora.product import Shared, biases, fits, joined_factors, norm_of, normed, product
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig


class LoraLinear(LinearAdapter):
    """A frozen Megatron Core linear and its adapter.

    `lora_a`: [Σ r, in], cut by columns under a row-parallel base. `lora_b{i}`: [rows of atom i, r], cut by rows under
    a column-parallel one; `lora_b` is of all rows. `lora_m{i}` (DoRA): [rows of atom i].
    """

    lora_a: torch.Tensor
    #: Whether base and adapter may be one product, whose output nothing behind it changes in place.
    may_join = True

    def __init__(
        self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seed: int, expert: bool = False
    ) -> None:
        super().__init__(base, lora, slots, config, expert)
        weight = self.weight
        a = first_factor(weight, slots.width, seed, self.group if self.row_parallel else None)
        # experts clamp their first product in place, which the output of a node of its own does not allow
        self.joins_base = (
            self.may_join and not expert and fits(base, tp=self.tp, quantized=bool(config.fp8 or config.fp4))
        )
        self.norm, self.ends_checkpoint = norm_of(base) if self.joins_base else None, False
        self.add("a", a, 1 if self.row_parallel else None)
        sized = [(slots.groups * size, slots.ranks[part]) for _, size, part in slots.places]
        for name, (rows, rank) in zip(slots.names, sized, strict=True):
            b = torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device)
            self.add(f"b{name}", b, self.row_cut)
        self.dora = lora.dora
        if lora.dora:
            repeats = self._norm().view(slots.groups, slots.stride)
            for name, (row, size, _) in zip(slots.names, slots.places, strict=True):
                m = repeats[:, row : row + size].reshape(-1).to(weight.dtype)
                self.add(f"m{name}", m, self.row_cut)

    def adapted(self, x: torch.Tensor, arguments: tuple[object, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output with the adapter's added."""
        if self.joins_base and not self.dora and not (self.dropout and self.training):
            return self._run_joined(x)
        y, bias, seen = self.run_base(x, arguments)
        h = self._between(F.linear(self._drop(seen), self._a(self.lora_a)))
        if not self.dora:
            out = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self._joined().t(), alpha=self.scale)
            return out.view(y.shape), bias
        # arXiv 2402.09353: W' = m · (W + s B A) / |W + s B A|, rows; the norm is a constant to the gradient
        own = None if bias is not None else getattr(self.base, "bias", None)
        own = own if isinstance(own, torch.Tensor) and own.numel() else None
        factor = self._magnitudes() / self._norm()
        bare = y if own is None else y - own
        out = (bare + F.linear(h, self._joined()) * self.scale) * factor.to(y.dtype)
        return out if own is None else out + own, bias

    def _run_joined(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same output from one node; see `mbx.train.lora.product`."""
        weight = self.weight
        added, deferred = biases(self.base)
        seen = x if self.norm is None else normed(x, self.base, self.norm)
        # a checkpointed layer runs first without gradients, and again with them when only its inside is needed
        unread = self.ends_checkpoint and self.training and torch.is_grad_enabled()
        a, factors = self._a(self.lora_a), self.factors()
        shared = Shared(self.group, self.row_parallel) if self.tp > 1 else None
        y = product(seen, weight, added, a, factors, self.scale, layout=self.layout, unread=unread, shared=shared)
        return y, deferred

    def _between(self, h: torch.Tensor) -> torch.Tensor:
        """What tensor parallelism needs between A and B; h: [s, b, atoms · r]."""
        from mbx.models.megatron.core.groups import mappings

        if self.tp == 1 or self.whole or self.expert:
            return h
        if self.row_parallel and self.sequence_parallel:
            moved = mappings.reduce_scatter_to_sequence_parallel_region(h)
        elif self.row_parallel:
            moved = mappings.reduce_from_tensor_model_parallel_region(h)
        elif self.sequence_parallel:
            moved = mappings.gather_from_sequence_parallel_region(h)
        else:
            moved = mappings.copy_to_tensor_model_parallel_region(h)
        assert isinstance(moved, torch.Tensor)
        return moved

    def _joined(self) -> torch.Tensor:
        """All B's as one [out, Σ r], block by block in Megatron Core's row order."""
        joined = joined_factors(self.factors(), self.layout)
        return self._summed(joined) if self.row_parallel else joined

    def _magnitudes(self) -> torch.Tensor:
        """DoRA's magnitudes of all rows in Megatron Core's order: a row that no part adapts keeps its norm."""
        return self.over_rows("m", self._norm())

    @torch.no_grad()
    def _norm(self) -> torch.Tensor:
        """Norm of each row of `W + s B A` in fp32, [out], without building the product.

        |W + s B A|² = |W|² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩ by rows; a row-parallel base sums over its ranks.
        """
        weight = self.weight
        a, b = self._a(self.lora_a).float(), joined_factors(self.factors(), self.layout).float()
        square: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()  # no fp32 copy
        cross, gram = weight.float() @ a.t(), a @ a.t()
        if self.row_parallel and self.tp > 1:
            for part in (square, cross, gram):
                torch.distributed.all_reduce(part, group=self.group)
        total = square + 2 * self.scale * (cross * b).sum(1) + self.scale**2 * ((b @ gram) * b).sum(1)
        return total.clamp(min=0).sqrt()

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """`W + s B A` (DoRA: scaled to its magnitudes) in fp32, this rank's part: [out, in]."""
        weight = self.weight
        total = weight.float() + self.scale * self._joined().float() @ self._a(self.lora_a).float()
        if self.dora:
            total *= (self._magnitudes().float() / self._norm())[:, None]
        return total

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: object = None
    ) -> dict[str, object]:
        """The base under its own keys and the adapter beside it, halves of gated rows told apart."""
        made = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.slots.gated:  # gate and up of this rank
            cut_gated(made, [f"{prefix}lora_b", f"{prefix}lora_m"], sharded_offsets)
        return made


def cut_gated(content: dict[str, object], names: list[str], sharded_offsets: tuple[tuple[int, int, int], ...]) -> None:
    """Say of entries that their rows are gate and up of this rank, as Megatron Core's MLP says of its own."""
    from mbx.models.megatron.core.sharding import apply_swiglu_sharded_factory

    for name in names:
        if name in content:
            content[name] = apply_swiglu_sharded_factory(content[name], sharded_offsets)
