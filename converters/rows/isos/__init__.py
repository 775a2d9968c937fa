"""Registered conversions between Hugging Face config values and Megatron Core ones, both ways.

`VALUE` pairs translate one key; `FIELDS` translate a group of keys into a group of fields. Law of each:
`to_hf(to_mcore(x)) == x` for every x that `to_mcore` accepts; what it does not accept is a UsageError.
"""

from __future__ import annotations

import math

from converters.rows.isos import diffusion, experts, gemma4, kimi, layers, lfm2, mimo, minimax, rope, step
from converters.rows.isos.base import FieldsIso, ValueIso, layers_of, plain, positive
from converters.rows.isos.experts import inexpressible_groups
from converters.rows.isos.rope import LLAMA3_FIXED, inexpressible_rope

__all__ = ["FIELDS", "LLAMA3_FIXED", "VALUE", "FieldsIso", "ValueIso", "inexpressible_groups", "inexpressible_rope"]

FIELDS: dict[str, FieldsIso] = {
    "moe_layers": FieldsIso(("moe_layer_freq",), experts.moe_layers_to_mcore, experts.moe_layers_to_hf),
    "moe_step": FieldsIso(("moe_layer_freq",), experts.moe_step_to_mcore, experts.moe_step_to_hf),
    "moe_range": FieldsIso(("moe_layer_freq",), experts.moe_range_to_mcore, experts.moe_range_to_hf),
    "mlp_layers": FieldsIso(("moe_layer_freq",), experts.mlp_layers_to_mcore, experts.mlp_layers_to_hf),
    "greedy_groups": FieldsIso(
        ("moe_router_num_groups", "moe_router_group_topk"), experts.greedy_groups_to_mcore, experts.greedy_groups_to_hf
    ),
    "mla_rope": FieldsIso(
        ("rope_type", *(field for field, _ in rope.MLA_YARN.values())), rope.mla_rope_to_mcore, rope.mla_rope_to_hf
    ),
    "full_layers": FieldsIso((), layers.full_layers_to_mcore, layers.full_layers_to_hf),
    "ssm_width": FieldsIso((), layers.ssm_width_to_mcore, layers.ssm_width_to_hf),
    "indexed_layers": FieldsIso(
        ("dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"),
        layers.indexed_layers_to_mcore,
        layers.indexed_layers_to_hf,
    ),
    "linear_layers": FieldsIso(("linear_attention_freq",), layers.linear_layers_to_mcore, layers.linear_layers_to_hf),
    "hybrid": FieldsIso(("num_layers", "model.hybrid_override_pattern"), layers.hybrid_to_mcore, layers.hybrid_to_hf),
    "hybrid_mtp": FieldsIso(
        ("model.mtp_num_layers", "model.mtp_hybrid_override_pattern", "model.mtp_block_layers"),
        layers.hybrid_mtp_to_mcore,
        layers.hybrid_mtp_to_hf,
    ),
    "rope": FieldsIso(
        rope.PLAIN,
        rope.rope_to_mcore,
        rope.rope_to_hf,
    ),
    "neox_rope": FieldsIso(
        ("model.rotary_base", "model.rotary_percent"), rope.neox_rope_to_mcore, rope.neox_rope_to_hf
    ),
    "window": FieldsIso(("window_size",), layers.window_to_mcore, layers.window_to_hf),
    "mimo_layers": FieldsIso(("window_size", "window_attn_skip_freq"), mimo.layers_to_mcore, mimo.layers_to_hf),
    "minimax_layers": FieldsIso(minimax.FIELDS, minimax.layers_to_mcore, minimax.layers_to_hf),
    "kda_layers": FieldsIso(
        ("linear_attention_freq", "kda_num_heads", "kda_head_dim", "kda_conv_kernel_dim"),
        kimi.layers_to_mcore,
        kimi.layers_to_hf,
    ),
    "k3_layers": FieldsIso(
        ("linear_attention_freq", "kda_num_heads", "kda_head_dim", "kda_conv_kernel_dim", "kda_gate_lower_bound"),
        kimi.k3_layers_to_mcore,
        kimi.k3_layers_to_hf,
    ),
    "step_layers": FieldsIso(
        ("window_size", "window_attn_skip_freq", "windowed_num_attention_heads", "model.rotary_base")
        + ("model.rotary_base_local", "model.rotary_percent", "model.rotary_percent_local"),
        step.layers_to_mcore,
        step.layers_to_hf,
    ),
    "step_experts": FieldsIso(("moe_layer_freq",), step.experts_to_mcore, step.experts_to_hf),
    "swiglu_limits": FieldsIso(("swiglu_limits", "swiglu_limits_shared"), step.limits_to_mcore, step.limits_to_hf),
    "short_conv_layers": FieldsIso(
        ("short_conv_layers", "hetereogenous_dist_checkpoint"),
        lfm2.short_conv_layers_to_mcore,
        lfm2.short_conv_layers_to_hf,
    ),
    "adjusted_width": FieldsIso(("ffn_hidden_size",), lfm2.adjusted_width_to_mcore, lfm2.adjusted_width_to_hf),
    "gemma4_heads": FieldsIso(
        ("kv_channels", "num_query_groups", "windowed_kv_channels", "windowed_num_query_groups", "attention_k_eq_v"),
        gemma4.heads_to_mcore,
        gemma4.heads_to_hf,
    ),
    "gemma4_sharing": FieldsIso(
        ("num_kv_shared_layers", "use_double_wide_mlp", "hetereogenous_dist_checkpoint"),
        gemma4.sharing_to_mcore,
        gemma4.sharing_to_hf,
    ),
    "gemma4_experts": FieldsIso(
        ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        + ("moe_router_pre_softmax",),
        gemma4.experts_to_mcore,
        gemma4.experts_to_hf,
    ),
    "unrotated_full_layers": FieldsIso(
        ("window_size", "window_attn_skip_freq", "no_rope_freq"),
        layers.unrotated_full_layers_to_mcore,
        layers.unrotated_full_layers_to_hf,
    ),
    "yarn": FieldsIso(
        (
            "model.position_embedding_type",
            *rope.PLAIN,
            *(field for field, _ in rope.YARN.values()),
            rope._QUERY_SCALING,
        ),
        rope.yarn_to_mcore,
        rope.yarn_to_hf,
    ),
    "longrope": FieldsIso(
        (
            "model.position_embedding_type",
            *rope.PLAIN,
            "longrope_scaling",
            "longrope_original_max_position_embeddings",
        ),
        rope.longrope_to_mcore,
        rope.longrope_to_hf,
    ),
    "dit_heads": FieldsIso(diffusion.HEADS, diffusion.heads_to_mcore, diffusion.heads_to_hf),
    "wan_patch": FieldsIso(("patch_temporal", "patch_spatial"), diffusion.patch_to_mcore, diffusion.patch_to_hf),
    "flux_channels": FieldsIso(("in_channels",), diffusion.flux_channels_to_mcore, diffusion.flux_channels_to_hf),
    "flux_mlp": FieldsIso(("ffn_hidden_size",), diffusion.flux_mlp_to_mcore, diffusion.flux_mlp_to_hf),
    "gelu_tanh": FieldsIso(("activation_func",), experts.gelu_tanh_to_mcore, experts.gelu_tanh_to_hf),
}

VALUE: dict[str, ValueIso] = {
    "first_dense": ValueIso(experts.first_dense_to_mcore, experts.first_dense_to_hf),
    "shared_experts": ValueIso(experts.shared_experts_to_mcore, experts.shared_experts_to_hf),
    "no_linear": ValueIso(layers.no_linear_to_mcore, lambda _, mcore: [1] * layers_of(mcore, "num_layers")),
    "rotary_dim": ValueIso(rope.rotary_dim_to_mcore, rope.rotary_dim_to_hf),
    "no_rope": ValueIso(layers.no_rope_to_mcore, lambda v, _: layers.flipped(v)),
    "sliding_layers": ValueIso(layers.sliding_layers_to_mcore, layers.sliding_layers_to_hf),
    "not": ValueIso(lambda v, _: not v, lambda v, _: not v),
    "rsqrt": ValueIso(
        lambda v, _: 1.0 / math.sqrt(positive(v, "scale")),
        lambda v, _: plain(round(1.0 / positive(v, "softmax_scale") ** 2, 6)),
    ),
    "zero_is_none": ValueIso(lambda v, _: v or None, lambda v, _: v or 0),
}
