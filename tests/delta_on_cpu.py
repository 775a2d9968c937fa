"""Gated delta nets on a CPU: Megatron Core's own module, over its local linears, with its own torch recurrence.

Megatron Core builds these layers with Transformer Engine's linears and flash-linear-attention's kernels only; neither
changes what is computed. `deterministic_mode` chooses `torch_chunk_gated_delta_rule`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config

from mbx.models.megatron.specs import gpt_block_spec


def _l2norm(x: torch.Tensor) -> torch.Tensor:
    """fla's: x / √(Σ x² + ε), in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _block_spec(config: Any, *, use_te: bool, vp_stage: int | None = None, **others: Any) -> Any:
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mbx.models.megatron import specs
    from mbx.models.megatron.core.layers import get_transformer_layer_offset
    from mbx.models.megatron.local_modules import LocalNorm

    assert not use_te
    if config.experimental_attention_variant != "gated_delta_net":
        return gpt_block_spec(config, use_te=False, vp_stage=vp_stage, **others)
    block = specs._local_block_spec(config, vp_stage)
    layers: list[ModuleSpec] = []
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    for number in range(first, first + len(block.layer_specs)):
        routed = specs.expert_layers(config)[number]
        layer = specs.local_layer_spec(config, num_experts=config.num_moe_experts if routed else None)
        if (number + 1) % config.linear_attention_freq:
            parts = GatedDeltaNetSubmodules(ColumnParallelLinear, LocalNorm, RowParallelLinear)
            layer.submodules.self_attention = ModuleSpec(module=GatedDeltaNet, submodules=parts)
            layer.submodules.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.in_proj.layer_norm_"
        layers.append(layer)
    block.layer_specs = layers
    return block


@contextlib.contextmanager
def delta_on_cpu() -> Iterator[None]:
    """Build and run gated delta nets on a CPU for as long as the block lasts, in training as well."""
    from megatron.core.ssm import gated_delta_net

    from mbx.models.megatron import specs
    from mbx.train.run import prepare

    home = sys.modules[gated_delta_net.torch_chunk_gated_delta_rule.__module__]  # in 0.19 one of a package
    kernels = patch.multiple(home, HAVE_FLA=True, l2norm=_l2norm, create=True)
    nothing = lambda *_, **__: None  # noqa: E731
    checks = patch.multiple(prepare, check_local=nothing, check_kernels=nothing)
    eager = patch.object(torch._dynamo.config, "disable", True)  # compiling one small function takes half a minute
    with kernels, checks, eager, patch.object(specs, "gpt_block_spec", _block_spec):
        yield
