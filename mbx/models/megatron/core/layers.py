"""Megatron Core's GPT models: specs of their layers, and the modules that specs name."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention


def mlp_submodules(layer: ModuleSpec) -> Any:
    """What a spec of a layer says of its MLP's or its experts' modules; None where it names none.

    Up to 0.17 the MLP is a spec; since 0.18 a function, with its modules among its arguments.
    """
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else getattr(mlp, "submodules", None)


def holds_experts(layer: ModuleSpec) -> bool:
    """Whether a spec of a layer is of one with experts."""
    return getattr(mlp_submodules(layer), "experts", None) is not None


def without_norm(linear: type) -> type:
    """The column-parallel linear of a spec without the norm that Transformer Engine's fuses into it."""
    if linear.__name__ != "TELayerNormColumnParallelLinear":
        return linear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    plain: type = TEColumnParallelLinear
    return plain


__all__ = ["DotProductAttention", "FusedScaleMaskSoftmax", "GPTModel", "IdentityOp", "MLASelfAttention", "ModuleSpec"]
__all__ += ["MoELayer", "holds_experts", "mlp_submodules", "without_norm"]
__all__ += ["MultiTokenPredictionBlockSubmodules"]
__all__ += ["SelfAttention", "TransformerBlockSubmodules", "TransformerLayer", "VocabParallelEmbedding"]
__all__ += ["WrappedTorchNorm"]
__all__ += ["get_gpt_decoder_block_spec", "get_gpt_heterogeneous_layer_spec", "get_gpt_layer_local_spec"]
__all__ += ["get_gpt_mtp_block_spec", "get_num_layers_to_build"]
__all__ += ["get_transformer_block_with_experimental_attention_variant_spec", "get_transformer_layer_offset"]
__all__ += ["is_layer_window_attention"]
