"""The flat config the trainer builds from: the model's own, and what the recipe and the device add to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from converters.errors import UsageError
from converters.rows.expr import Value
from mbx.train.model.fp8 import fp8_config
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from mbx.train.model.blueprint import Blueprint

#: Megatron Core's name, and its default of 0.001 would move the bias of a base that is said to be frozen.
BIAS_RATE = "moe_router_bias_update_rate"


def train_config(recipe: Recipe, plan: Blueprint, ranks: Ranks) -> dict[str, Value]:
    """The flat config the trainer builds from: the model's, and what the recipe says of parallelism and precision."""
    config = {**(gpu_config(plan.config) if ranks.te else {}), **plan.config}
    p, tr = recipe.parallel, recipe.train
    config["calculate_per_token_loss"] = tr.per_token_loss
    config["deterministic_mode"] = tr.deterministic
    if recipe.data.packs and not ranks.te:
        config["masked_softmax_fusion"] = False  # its kernel for causal attention reads no mask
    if config.get("moe_router_enable_expert_bias"):
        config[BIAS_RATE] = bias_rate(recipe)
    if p.vpp > 1:
        # Sends and receives one by one: with two stages, both of a batch's would go to the same rank and be mixed up
        # (megatron/training/arguments.py refuses the batch there).
        config |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if sequence_parallel(recipe, ranks):
        config["sequence_parallel"] = True
    if tr.recompute == "full":
        config |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif tr.recompute == "selective":
        config |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return config | fp8_config(recipe.fp8)


def bias_rate(recipe: Recipe) -> float:
    """How far a step moves the router's expert bias, which no gradient reaches: not at all unless the recipe says so.

    A learning rate of 0 moves nothing.
    """
    asked = recipe.model.config.get(BIAS_RATE) or 0.0
    if isinstance(asked, bool) or not isinstance(asked, int | float):
        raise UsageError(f"model.config.{BIAS_RATE} must be a number, got {asked!r}")
    return float(asked) if recipe.optim.lr > 0 else 0.0


def sequence_parallel(recipe: Recipe, ranks: Ranks) -> bool:
    """Whether ranks of tensor parallelism share the tokens between the products."""
    p = recipe.parallel
    if p.tp == 1 or not p.sequence_parallel or ranks.device == "cuda":
        return p.tp > 1 and p.sequence_parallel
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)  # before, gloo scatters no sums


def gpu_config(config: Mapping[str, Value]) -> dict[str, Value]:
    """Fused kernels for a GPU with Transformer Engine: same mathematics, less memory and traffic.

    What the model's config or the recipe says about them wins.
    """
    # grouped experts with biases refuse it (megatron/core/transformer/moe/experts.py, TEGroupedMLP)
    experts_with_bias = bool(config.get("num_moe_experts")) and bool(config.get("add_bias_linear", True))
    fused: dict[str, Value] = {
        "bias_dropout_fusion": not experts_with_bias,
        "cross_entropy_loss_fusion": True,  # one kernel that turns logits into their gradient in place
        "cross_entropy_fusion_impl": "te",
    }
    if config.get("gated_linear_unit") and config.get("activation_func") == "silu":
        fused["bias_activation_fusion"] = True
    if config.get("model.position_embedding_type") == "rope" and not config.get("multi_latent_attention"):
        fused["apply_rope_fusion"] = True
    return fused
