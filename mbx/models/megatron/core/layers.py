"""Megatron Core's GPT models: specs of their layers, and the modules that specs name."""

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
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
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention

__all__ = ["DotProductAttention", "GPTModel", "IdentityOp", "ModuleSpec", "MultiTokenPredictionBlockSubmodules"]
__all__ += ["RotaryEmbedding", "SelfAttention", "TransformerBlockSubmodules", "WrappedTorchNorm"]
__all__ += ["get_gpt_decoder_block_spec", "get_gpt_heterogeneous_layer_spec", "get_gpt_layer_local_spec"]
__all__ += ["get_gpt_mtp_block_spec", "get_num_layers_to_build"]
__all__ += ["get_transformer_block_with_experimental_attention_variant_spec", "get_transformer_layer_offset"]
__all__ += ["is_layer_window_attention"]
