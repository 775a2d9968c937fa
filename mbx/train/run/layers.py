"""Refuses layers that the axes, the rows, or Megatron Core without Transformer Engine cannot train."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import DeviceError, UnsupportedError, UsageError
from converters.rows.expr import Value
from mbx.extras import install_line
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.config import sequence_parallel
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe


def check_axes(recipe: Recipe, plan: Blueprint, ranks: Ranks, dry: bool) -> None:
    """Refuse axes that these rows, this device or this model have no kernels for."""
    if recipe.parallel.cp > 1 and recipe.data.packs:
        raise UsageError("packed rows cannot be cut by context parallelism", hint="data.pack=false or parallel.cp=1")
    if recipe.parallel.cp > 1 and plan.config.get("experimental_attention_variant") == "gated_delta_net":
        raise UnsupportedError("gated delta nets are not cut by context parallelism", hint="parallel.cp=1")
    again = recipe.parallel.pp > 1 and recipe.train.recompute != "none"
    if plan.config.get("llama_4_scaling_beta") and recipe.data.packs and again:
        raise UnsupportedError(
            "queries are scaled by position: a stage that recomputes packed rows would take another micro-batch's",
            hint="data.pack=false, train.recompute=none or parallel.pp=1",
        )
    if recipe.parallel.cp > 1 and not ranks.te:
        raise DeviceError(
            f"parallel.cp={recipe.parallel.cp} needs the attention of Transformer Engine, on a GPU",
            hint="parallel.cp=1",
        )
    shared = recipe.parallel.sequence_parallel if dry else sequence_parallel(recipe, ranks)
    if plan.config.get("num_moe_experts") and recipe.parallel.tp > 1 and not shared:
        raise DeviceError(
            f"parallel.tp={recipe.parallel.tp}: Megatron Core trains experts under tensor parallelism with sequence "
            "parallelism only",
            hint="parallel.sequence_parallel=true, on a CPU with PyTorch 2.8 or newer",
        )


def check_local(config: Mapping[str, Value], *, adapters: bool, tp: int) -> None:
    """Refuse models that Megatron Core's own layers do not train."""
    # Their MLP adds a bias in place to a view, which autograd forbids where the view has a gradient to give.
    biased_experts = config.get("num_moe_experts") and config.get("add_bias_linear", True) and not adapters
    kinds = {
        "hybrid (Mamba) models": config.get("model.mcore_model") == "hybrid",
        f"{config.get('experimental_attention_variant')} layers": config.get("experimental_attention_variant"),
        "all weights of experts that have biases": biased_experts,
        # each rank would keep its own heads' share of what the rotated part of the keys, which all share, is told
        "latent attention under tensor parallelism": config.get("multi_latent_attention") and tp > 1,
    }
    if found := next((kind for kind, there in kinds.items() if there), None):
        raise UnsupportedError(
            f"Megatron Core trains {found} with Transformer Engine only",
            hint=f"on a GPU: {install_line('gpu')}",
        )
