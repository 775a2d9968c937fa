"""The adapter of one linear: its factors, the product, what tensor parallelism asks of them, its checkpoint entries.

A linear `y = W x` becomes `y = W x + s · B A x` (arXiv 2106.09685). `linear_qkv` holds the atoms q, k and v, a gated
`linear_fc1` gate and up; each atom has its own A and B of rank r, so an adapter is exactly PEFT's. The A's lie stacked
in one parameter and the B's are joined, in the row order Megatron Core gives the atoms, for one product. A weight that
Transformers holds fused as well has one A and one B, as PEFT gives it.

Tensor parallelism. Column-parallel base: A whole on every rank, B cut by rows. Row-parallel base: A cut by columns, B
whole. Between A and B lies a tensor of n·r columns, and that is what is communicated, not the activations. Experts
that have adapters are whole on their rank (`parallel.etp` is 1), so nothing is communicated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mbx.train.lora.adapter import WHOLE, Adapter, Slots, first_factor
from mbx.train.lora.product import biases, fits, joined_factors, norm_of, normed, product
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig


class LoraLinear(Adapter):
    """A frozen Megatron Core linear and its adapter.

    `lora_a`: [atoms · r, in], cut by columns under a row-parallel base. `lora_b{i}`: [rows of atom i, r], cut by rows
    under a column-parallel one. `lora_m{i}` (DoRA): [rows of atom i].
    """

    def __init__(
        self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seed: int, expert: bool = False
    ) -> None:
        super().__init__(base, lora, slots, config, expert)
        self.whole = type(base).__name__ in WHOLE
        # a fused norm hides the input of the product; Transformer Engine hands it out on request
        self.fused_norm = hasattr(base, "return_layernorm_output")
        if self.fused_norm:
            base.return_layernorm_output = True  # type: ignore[assignment]
        weight = self.weight
        a = first_factor(weight, slots.atoms * lora.rank, seed, self.group if self.row_parallel else None)
        # experts clamp their first product in place, which the output of a node of its own does not allow
        self.joins_base = not expert and fits(base, tp=self.tp, quantized=bool(config.fp8 or config.fp4))
        self.norm, self.ends_checkpoint = norm_of(base) if self.joins_base else None, False
        self.lora_a = self._own(a, 1 if self.row_parallel else None)
        cut = None if self.row_parallel or self.whole else 0
        for atom in range(slots.atoms):
            b = torch.zeros(slots.rows(atom), lora.rank, dtype=weight.dtype, device=weight.device)
            self.register_parameter(f"lora_b{atom}", self._own(b, cut))
        self.dora = lora.dora
        if lora.dora:
            norm = self._norm().split_with_sizes([s for _ in range(slots.pack.groups) for s in slots.pack.sizes])
            for atom in range(slots.atoms):
                m = torch.cat(norm[atom :: slots.atoms]).to(weight.dtype)
                self.register_parameter(f"lora_m{atom}", self._own(m, cut))

    def forward(self, x: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output with the adapter's added, and the base's bias where the caller adds it."""
        if self.joins_base and not self.dora and not (self.dropout and self.training):
            return self._run_joined(x)
        y, bias, seen = self._run_base(x, arguments)
        h = self._between(F.linear(self._drop(seen), self.lora_a))
        if not self.dora:
            out = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self._joined().t(), alpha=self.scale)
            return out.view(y.shape), bias
        # arXiv 2402.09353: W' = m · (W + s B A) / |W + s B A|, rows; the norm is a constant to the gradient
        own = None if bias is not None else getattr(self.base, "bias", None)
        own = own if isinstance(own, torch.Tensor) and own.numel() else None
        factor = self._join([self.get_parameter(f"lora_m{i}") for i in range(self.slots.atoms)]) / self._norm()
        bare = y if own is None else y - own
        out = (bare + F.linear(h, self._joined()) * self.scale) * factor.to(y.dtype)
        return out if own is None else out + own, bias

    def _run_joined(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same output from one node; see `mbx.train.lora.product`."""
        weight = self.weight
        added, deferred = biases(self.base)
        seen = x if self.norm is None else normed(x, self.base, self.norm)
        factors = [self.b(i) for i in range(self.slots.atoms)]
        # a checkpointed layer runs first without gradients, and again with them when only its inside is needed
        unread = self.ends_checkpoint and self.training and torch.is_grad_enabled()
        groups = self.slots.pack.groups if self.slots.atoms > 1 else 1
        y = product(seen, weight, added, self.lora_a, factors, self.scale, groups=groups, unread=unread)
        return y, deferred

    def _run_base(
        self, x: torch.Tensor, arguments: tuple[object, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Output, deferred bias, and the input of the product."""
        result = self.base(x, *arguments)
        if not self.fused_norm:
            return result[0], result[1], x
        if len(result) == 3:  # (y, bias, normed)
            return result[0], result[1], result[2]
        (y, normed), bias = result
        return y, bias, normed

    def _between(self, h: torch.Tensor) -> torch.Tensor:
        """What tensor parallelism needs between A and B; h: [s, b, atoms · r]."""
        from mbx.models.megatron.core.groups import mappings

        if self.tp == 1 or self.whole:
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
        """All B's as one [out, atoms · r], block by block in Megatron Core's row order."""
        return joined_factors([self.b(i) for i in range(self.slots.atoms)], self.slots.pack.groups)

    def _join(self, parts: list[torch.Tensor] | list[nn.Parameter]) -> torch.Tensor:
        """Vectors of the atoms in Megatron Core's row order."""
        groups = self.slots.pack.groups
        return torch.cat([part.view(groups, -1) for part in parts], dim=1).reshape(-1)

    @torch.no_grad()
    def _norm(self) -> torch.Tensor:
        """Norm of each row of `W + s B A` in fp32, [out], without building the product.

        |W + s B A|² = |W|² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩ by rows; a row-parallel base sums over its ranks.
        """
        weight = self.weight
        a, b = self.lora_a.float(), self._joined().float()
        square = weight.float().square().sum(1)
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
        total = weight.float() + self.scale * self._joined().float() @ self.lora_a.float()
        if self.dora:
            m = self._join([self.get_parameter(f"lora_m{i}") for i in range(self.slots.atoms)]).float()
            total *= (m / self._norm())[:, None]
        return total

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: object = None
    ) -> dict[str, object]:
        """The base under its own keys, so that any checkpoint of the model fits; the adapter beside it."""
        from mbx.models.megatron.core.sharding import (
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
        )

        known = ensure_metadata_has_dp_cp_group(metadata)
        base = self.base.sharded_state_dict(prefix, sharded_offsets, known)  # type: ignore[operator]
        own = dict(self.named_parameters(recurse=False))
        axes = {name: 1 if name == "lora_a" else 0 for name in own if (name == "lora_a") == self.row_parallel}
        made: dict[str, object] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {} if self.whole else axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=known["dp_cp_group"],
        )
        if self.slots.gated:  # the MLP around knows its linear by a name that is not this one's any more
            cut = [f"{prefix}weight", f"{prefix}bias"]
            cut_gated(base, cut, sharded_offsets)
            if self.slots.atoms == 1:
                cut_gated(made, [f"{prefix}lora_b0", f"{prefix}lora_m0"], sharded_offsets)
        return {f"{prefix}base.{key[len(prefix) :]}": value for key, value in base.items()} | made


def cut_gated(content: dict[str, object], names: list[str], sharded_offsets: tuple[tuple[int, int, int], ...]) -> None:
    """Say of entries that their rows are gate and up of this rank, as Megatron Core's MLP says of its own."""
    from mbx.models.megatron.core.sharding import apply_swiglu_sharded_factory

    for name in names:
        if name in content:
            content[name] = apply_swiglu_sharded_factory(content[name], sharded_offsets)
