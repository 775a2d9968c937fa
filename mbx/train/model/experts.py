"""Whether a run's experts are one product each way (`mbx.models.megatron.core.experts`)."""

from __future__ import annotations

from collections.abc import Mapping

from converters.rows.expr import Value
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe


def joins_experts(recipe: Recipe, config: Mapping[str, Value], ranks: Ranks) -> bool:
    """Frozen experts without biases, in bf16, all on one GPU that has the kernel: Hopper or newer, as one that is
    elsewhere is taken to be.

    Rows of the kernel's operands begin at multiples of 16 bytes, an adapter's too. PyTorch has it since 2.10.
    """
    import torch

    p, lora = recipe.parallel, recipe.lora
    return bool(
        config.get("num_moe_experts")
        and config.get("moe_grouped_gemm")
        and lora.rank
        and not any(rank % 8 for rank in (lora.rank, *lora.rank_pattern.values()))
        and not config.get("add_bias_linear", True)
        and not config.get("moe_expert_capacity_factor")
        and not config.get("moe_latent_size")
        and config.get("moe_token_dispatcher_type", "allgather") == "allgather"
        and p.tp == p.ep == p.etp == 1
        and recipe.train.precision == "bf16"
        and recipe.fp8.recipe == "none"
        and ranks.te
        and hasattr(torch.nn.functional, "grouped_mm")
        and (not torch.cuda.is_available() or torch.cuda.get_device_capability(ranks.local_rank) >= (9, 0))
    )
