"""Megatron Core's configs and the functions they name."""

from megatron.core.activations import fast_gelu, squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.utils import get_model_config

__all__ = ["HeterogeneousTransformerConfig", "MLATransformerConfig", "TransformerConfig", "fast_gelu"]
__all__ += ["get_model_config", "quick_gelu", "squared_relu"]
