"""LoRA and DoRA on Megatron Core's linears, one adapter for each Hugging Face projection inside a fused weight.

A linear `y = W x` becomes `y = W x + s · B A x` (arXiv 2106.09685). `linear_qkv` holds the atoms q, k and v, a gated
`linear_fc1` gate and up; each atom has its own A and B of rank r, so an adapter is exactly PEFT's. The A's lie stacked
in one parameter and the B's are joined, in the row order Megatron Core gives the atoms, for one product.

Tensor parallelism. Column-parallel base: A whole on every rank, B cut by rows. Row-parallel base: A cut by columns, B
whole. Between A and B lies a tensor of n·r columns, and that is what is communicated, not the activations.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from converters.errors import LayoutError, UnsupportedError, UsageError
from converters.pack import Pack
from mbx.train.model import Blueprint, as_int
from mbx.train.recipe import Lora, Recipe

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_COLUMN = ("ColumnParallelLinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear")
_ROW = ("RowParallelLinear", "TERowParallelLinear")


@dataclass(frozen=True, slots=True)
class Slots:
    """How an adapter's atoms share the base's output rows on this rank: a Pack of `groups` repeats of `sizes`."""

    pack: Pack

    @property
    def atoms(self) -> int:
        """Number of atoms."""
        return len(self.pack.sizes)

    def rows(self, atom: int) -> int:
        """Rows of one atom on this rank."""
        return self.pack.groups * self.pack.sizes[atom]


class LoraLinear(nn.Module):
    """A frozen Megatron Core linear and its adapter.

    `lora_a`: [atoms · r, in], cut by columns under a row-parallel base. `lora_b{i}`: [rows of atom i, r], cut by rows
    under a column-parallel one. `lora_m{i}` (DoRA): [rows of atom i]. `scale` is alpha / r.
    """

    def __init__(self, base: nn.Module, lora: Lora, slots: Slots, config: TransformerConfig, seed: int) -> None:
        from megatron.core import parallel_state

        super().__init__()
        self.base, self.slots, self.config = base, slots, config
        self.rank, self.scale, self.dropout = lora.rank, lora.alpha / lora.rank, lora.dropout
        self.row_parallel = type(base).__name__ in _ROW
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.sequence_parallel = config.sequence_parallel and self.tp > 1
        # a fused norm hides the input of the product; Transformer Engine hands it out on request
        self.fused_norm = hasattr(base, "return_layernorm_output")
        if self.fused_norm:
            base.return_layernorm_output = True  # type: ignore[assignment]
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        a = _first_factor(weight, slots.atoms * lora.rank, seed, self.row_parallel)
        self.lora_a = self._own(a, 1 if self.row_parallel else None)
        for atom in range(slots.atoms):
            b = torch.zeros(slots.rows(atom), lora.rank, dtype=weight.dtype, device=weight.device)
            self.register_parameter(f"lora_b{atom}", self._own(b, None if self.row_parallel else 0))
        self.dora = lora.dora
        if lora.dora:
            norm = self._norm().split_with_sizes([s for _ in range(slots.pack.groups) for s in slots.pack.sizes])
            for atom in range(slots.atoms):
                m = torch.cat(norm[atom :: slots.atoms]).to(weight.dtype)
                self.register_parameter(f"lora_m{atom}", self._own(m, None if self.row_parallel else 0))

    def _own(self, value: torch.Tensor, cut: int | None) -> nn.Parameter:
        """A trainable parameter, marked as Megatron Core marks its own."""
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        parameter = nn.Parameter(value)
        set_tensor_model_parallel_attributes(parameter, cut is not None, cut or 0, 1)
        if cut is None and self.sequence_parallel:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]  # each rank sees its tokens: sum gradients
        return parameter

    def b(self, atom: int) -> nn.Parameter:
        """B of one atom."""
        return self.get_parameter(f"lora_b{atom}")

    def forward(self, x: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output with the adapter's added, and the base's bias where the caller adds it."""
        y, bias, seen = self._run_base(x, arguments)
        h = F.linear(self._drop(seen), self.lora_a)
        h = self._between(h)
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

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        if self.row_parallel or self.sequence_parallel:  # each rank holds other values: other masks
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def _between(self, h: torch.Tensor) -> torch.Tensor:
        """What tensor parallelism needs between A and B; h: [s, b, atoms · r]."""
        from megatron.core.tensor_parallel import mappings

        if self.tp == 1:
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
        n, r, groups = self.slots.atoms, self.rank, self.slots.pack.groups
        if n == 1:
            return self.b(0)
        blocks = [
            F.pad(self.b(i).view(groups, size, r), (i * r, (n - 1 - i) * r))
            for i, size in enumerate(self.slots.pack.sizes)
        ]
        return torch.cat(blocks, dim=1).view(-1, n * r)

    def _join(self, parts: list[torch.Tensor] | list[nn.Parameter]) -> torch.Tensor:
        """Vectors of the atoms in Megatron Core's row order."""
        groups = self.slots.pack.groups
        return torch.cat([part.view(groups, -1) for part in parts], dim=1).reshape(-1)

    @torch.no_grad()
    def _norm(self) -> torch.Tensor:
        """Norm of each row of `W + s B A` in fp32, [out], without building the product.

        |W + s B A|² = |W|² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩ by rows; a row-parallel base sums over its ranks.
        """
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        a, b = self.lora_a.float(), self._joined().float()
        square = weight.float().square().sum(1)
        cross, gram = weight.float() @ a.t(), a @ a.t()
        if self.row_parallel and self.tp > 1:
            from megatron.core import parallel_state

            for part in (square, cross, gram):
                torch.distributed.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
        total = square + 2 * self.scale * (cross * b).sum(1) + self.scale**2 * ((b @ gram) * b).sum(1)
        return total.clamp(min=0).sqrt()

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """`W + s B A` (DoRA: scaled to its magnitudes) in fp32, this rank's part: [out, in]."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        total = weight.float() + self.scale * self._joined().float() @ self.lora_a.float()
        if self.dora:
            m = self._join([self.get_parameter(f"lora_m{i}") for i in range(self.slots.atoms)]).float()
            total *= (m / self._norm())[:, None]
        return total

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: object = None
    ) -> dict[str, object]:
        """The base under its own keys, so that any checkpoint of the model fits; the adapter beside it."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        base = self.base.sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[operator]
        content = {f"{prefix}base.{key[len(prefix) :]}": value for key, value in base.items()}
        own = dict(self.named_parameters(recurse=False))
        axes = {name: 1 if name == "lora_a" else 0 for name in own if (name == "lora_a") == self.row_parallel}
        content.update(make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets))
        return content


def _first_factor(weight: torch.Tensor, rows: int, seed: int, row_parallel: bool) -> torch.Tensor:
    """A, uniform in ±1/√in as PEFT draws it (Kaiming, a = √5), the same for every parallel layout."""
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_world_size() if row_parallel else 1
    inputs = weight.shape[1] * tp
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(inputs)
    whole = torch.empty(rows, inputs).uniform_(-bound, bound, generator=generator)
    if tp > 1:
        rank = parallel_state.get_tensor_model_parallel_rank()
        whole = whole[:, rank * weight.shape[1] : (rank + 1) * weight.shape[1]]
    return whole.to(device=weight.device, dtype=weight.dtype).contiguous()


def check_lora(recipe: Recipe, plan: Blueprint) -> None:
    """Refuse targets that have no adapter here, before anything is built."""
    if unknown := [name for name in recipe.lora.targets if name not in TARGETS]:
        raise UsageError(f"lora.targets: {', '.join(unknown)}; adapters exist for {', '.join(TARGETS)}")
    if plan.config.get("num_moe_experts") and {"linear_fc1", "linear_fc2"} & set(recipe.lora.targets):
        raise UnsupportedError(
            "adapters on experts are not supported", hint="lora.targets=linear_qkv,linear_proj trains the attention"
        )
    if plan.config.get("multi_latent_attention") or plan.config.get("experimental_attention_variant"):
        raise UnsupportedError("adapters are supported on standard attention, which this model does not have")
    if recipe.lora.dora and recipe.fp8.recipe != "none":
        raise UnsupportedError("DoRA under FP8 is not supported: its norms would not be those of the FP8 weights")


def attach(model: nn.Module, lora: Lora, plan: Blueprint, seed: int) -> None:
    """Freeze `model` and put an adapter on every target linear of its decoder; `seed` draws the A's."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith("decoder.layers.") and name.rpartition(".")[2] in lora.targets
    ]
    for name, base in found:
        if type(base).__name__ not in (*_COLUMN, *_ROW):
            raise UnsupportedError(f"`{name}` is a {type(base).__name__}, which takes no adapter")
        parent, _, leaf = name.rpartition(".")
        # by name, counted over the whole model, so that no layout and no stage changes what is drawn
        drawn = seed + zlib.crc32(_global_name(model, name).encode())
        adapter = LoraLinear(base, lora, _slots(leaf, base, plan), model.config, drawn)
        setattr(model.get_submodule(parent), leaf, adapter)
    if hasattr(model, "embedding"):
        # recomputed layers only have gradients when their input asks for one; a frozen embedding's does not
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))  # type: ignore[union-attr]


def _slots(leaf: str, base: nn.Module, plan: Blueprint) -> Slots:
    from megatron.core import parallel_state

    weight = base.weight
    assert isinstance(weight, torch.Tensor)
    if leaf == "linear_qkv":
        heads = as_int(plan.config, "num_attention_heads")
        groups = plan.config.get("num_query_groups") or heads
        head = plan.config.get("kv_channels") or as_int(plan.config, "hidden_size") // heads
        assert isinstance(groups, int) and isinstance(head, int)
        tp = parallel_state.get_tensor_model_parallel_world_size()
        if groups % tp:
            raise LayoutError(f"tp {tp} does not divide the {groups} query groups, which adapters need")
        pack = Pack(groups // tp, (heads // groups * head, head, head))
    elif leaf == "linear_fc1" and plan.config.get("gated_linear_unit"):
        pack = Pack(1, (weight.shape[0] // 2, weight.shape[0] // 2))
    else:
        pack = Pack(1, (weight.shape[0],))
    if pack.rows != weight.shape[0]:
        raise UnsupportedError(f"`{leaf}` has {weight.shape[0]} rows, {pack.rows} were expected: no adapter fits")
    return Slots(pack)


def _global_name(model: nn.Module, name: str) -> str:
    """A module's name with its layer counted over the whole pipeline."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    assert layer is not None
    number = model.get_submodule(layer.group(0)[:-1]).layer_number
    return f"decoder.layers.{int(number) - 1}.{name[layer.end() :]}"  # type: ignore[arg-type]


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Adapters of a bare model by global module name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield _global_name(model, name), module


def only_adapters(weights: Mapping[str, object]) -> dict[str, object]:
    """The adapters' entries of a sharded state dict."""
    return {name: value for name, value in weights.items() if name.rpartition(".")[2].startswith("lora_")}


def base_of(recorded: str) -> Path:
    """Where a resumed adapter run finds its frozen base; UsageError where it is gone."""
    if not recorded or not Path(recorded).is_dir():
        raise UsageError(
            f"--resume: the adapters' base `{recorded or 'random weights'}` is not there",
            hint="put it back: the run's checkpoints hold adapters only",
        )
    return Path(recorded)
