"""Megatron Core's sparse attention, since 0.19: its spec, local modules that fit it, whose choice a layer takes."""

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.experimental_attention_variant.dsa import (
    is_dsa_skip_topk_layer,
    source_dsa_compute_layer,
)

__all__ = ["ColumnParallelLinear", "Linear", "LocalSpecProvider", "get_dsa_module_spec_for_backend"]
__all__ += ["is_dsa_skip_topk_layer", "source_dsa_compute_layer"]
