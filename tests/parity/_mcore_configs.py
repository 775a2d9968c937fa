"""Flat mcore configs of the peer checkpoints, written by hand from their config.json."""

from __future__ import annotations

from mbx.models.megatron.config import FlatConfig

LLAMA: FlatConfig = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "model.vocab_size": 256,
    "model.max_sequence_length": 512,
    "model.position_embedding_type": "rope",
    "model.rotary_base": 500000.0,
    "model.rotary_percent": 1.0,
    "model.rope_scaling": True,
    "model.rope_scaling_factor": 32.0,
    "model.share_embeddings_and_output_weights": False,
}

QWEN3_MOE: FlatConfig = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "qk_layernorm": True,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 48,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_pre_softmax": False,
    "moe_router_dtype": "fp32",
    "moe_grouped_gemm": True,
    "model.vocab_size": 256,
    "model.max_sequence_length": 512,
    "model.position_embedding_type": "rope",
    "model.rotary_base": 10000.0,
    "model.share_embeddings_and_output_weights": False,
}

# The window is [31, 0]: Transformers' sliding_window 32 counts the query's own position, mcore's window does not.
GPT_OSS: FlatConfig = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 64,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "activation_func": "quick_gelu",
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "add_bias_linear": True,
    "softmax_type": "learnable",
    "window_size": [31, 0],
    "window_attn_skip_freq": 2,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 64,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_grouped_gemm": True,
    "yarn_rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": False,
    "model.vocab_size": 256,
    "model.max_sequence_length": 512,
    "model.position_embedding_type": "yarn",
    "model.rotary_base": 150000.0,
    "model.share_embeddings_and_output_weights": False,
}

SMALL: FlatConfig = {
    key: value
    for key, value in {**LLAMA, "num_layers": 2}.items()
    if key not in ("model.rope_scaling", "model.rope_scaling_factor")
}

GPT2: FlatConfig = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "normalization": "LayerNorm",
    "activation_func": "gelu_tanh",
    "add_bias_linear": True,
    "model.vocab_size": 250,
    "model.max_sequence_length": 64,
    "model.position_embedding_type": "learned_absolute",
    "model.share_embeddings_and_output_weights": True,
}

MLA_MOE_MTP: FlatConfig = {
    **{key: value for key, value in QWEN3_MOE.items() if key not in ("kv_channels", "num_query_groups", "num_layers")},
    "num_layers": 3,
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "moe_layer_freq": [0, 1, 1],
    "moe_shared_expert_intermediate_size": 48,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "mtp_num_layers": 1,
}

ZERO_CENTERED_GATED: FlatConfig = {
    **SMALL,
    "qk_layernorm": True,
    "layernorm_zero_centered_gamma": True,
    "attention_output_gate": True,
    "gated_linear_unit": False,
    "activation_func": "squared_relu",
}
