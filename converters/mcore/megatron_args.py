"""Megatron-LM's `args` and Megatron Core's config fields, both ways, as far as they describe model and layout.

Sources: `core_transformer_config_from_args` and `load_args_from_checkpoint` in megatron/training of Megatron-LM
with megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.mcore.layout import Layout
from converters.mcore.releases import CURRENT
from converters.mcore.statement import NAME, completed, statement_of
from converters.rows.config_map import check_fields
from converters.rows.expr import Value

#: Fields that bear one name on both sides, by the part of a model that has them.
_ALWAYS = """num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels layernorm_epsilon init_method_std
attention_dropout hidden_dropout normalization add_bias_linear add_qkv_bias qk_layernorm attention_output_gate
layernorm_zero_centered_gamma rotary_interleaved softmax_type softmax_scale window_size window_attn_skip_freq
no_rope_freq glu_linear_offset activation_func_clamp_value mtp_num_layers multi_latent_attention
experimental_attention_variant linear_attention_freq fp32_residual_connection""".split()
_LATENT = """q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor mscale
mscale_all_dim rope_type beta_fast beta_slow original_max_position_embeddings""".split()
_EXPERTS = """moe_ffn_hidden_size moe_layer_freq moe_router_topk moe_router_pre_softmax moe_router_score_function
moe_router_enable_expert_bias moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
moe_router_load_balancing_type moe_aux_loss_coeff moe_router_dtype moe_grouped_gemm
moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size""".split()
_DELTA = """linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
linear_num_value_heads""".split()
_SPARSE = """dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq
dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved dsa_indexer_k_norm_epsilon""".split()
_MAMBA = "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads".split()
_YARN = """yarn_rotary_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_mscale
yarn_mscale_all_dim yarn_correction_range_round_to_int""".split()
#: Fields that Megatron-LM, Megatron-Bridge and Megatron Core call alike.
FIELDS_OF_BOTH = (*_ALWAYS, *_LATENT, *_EXPERTS, *_DELTA, *_SPARSE, *_MAMBA, *_YARN)
#: What some families add to YaRN, and Megatron Core has no field for; unsaid, they would pass for others.
_BEYOND_YARN = ("llama_4_scaling_beta",)
#: Arguments of GPTModel.
MODEL_ARGUMENTS = (
    *("vocab_size", "position_embedding_type", "rotary_base", "rotary_percent", "rope_scaling"),
    *("rope_scaling_factor", "seq_len_interpolation_factor", "share_embeddings_and_output_weights"),
)
#: Some of them, and what Megatron-LM calls them.
_MODEL = {
    "max_sequence_length": "max_position_embeddings",
    **{name: name for name in ("rotary_base", "rotary_percent", "rope_scaling_factor")},
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
#: Flags that say whether an MLP is gated, and by which activation; a plain gelu without any.
_ACTIVATIONS = {"swiglu": (True, "silu"), "quick_geglu": (True, "quick_gelu"), "squared_relu": (False, "squared_relu")}
#: Fields that training sets and no weight or forward pass depends on. A sequence length is one: Megatron-Bridge
#: states the training's, and under rotary positions nothing else depends on it.
TRAINING = frozenset(
    """attention_dropout hidden_dropout init_method_std moe_router_load_balancing_type moe_aux_loss_coeff
    moe_router_dtype moe_grouped_gemm fp32_residual_connection model.max_sequence_length""".split()
)


def is_plain(value: object) -> bool:
    """Whether a value can stand in a config: a number, a text, a flag, None, or a list of them."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _value(value: object) -> Value:
    return [_value(item) for item in value] if isinstance(value, list | tuple) else value  # type: ignore[return-value]


def config_of_args(args: Mapping[str, object]) -> dict[str, Value]:
    """Flat Megatron Core config of Megatron-LM's `args`; fields that the args do not have are left out.

    Empty for `args` of a tool that rebuilds its models from the Hugging Face config and states nothing of them:
    Megatron-LM's defaults are not theirs. UsageError for values that no config has.
    """
    if is_silent(args):
        return {}
    pattern = args.get("hybrid_override_pattern") or args.get("hybrid_layer_pattern")
    hybrid = bool(args.get("is_hybrid_model") or pattern)
    wanted = [*_ALWAYS]
    for names, there in (
        (_LATENT, args.get("multi_latent_attention")),
        (_EXPERTS, args.get("num_experts")),
        (_DELTA, args.get("experimental_attention_variant") == "gated_delta_net"),
        (_SPARSE, args.get("experimental_attention_variant") == "dsa"),
        (_MAMBA, hybrid),
        ((*_YARN, *_BEYOND_YARN), args.get("position_embedding_type") == "yarn"),
    ):
        wanted += names if there else []
    out = {name: _value(args[name]) for name in wanted if name in args and is_plain(args[name])}
    if "layernorm_epsilon" not in out and is_plain(args.get("norm_epsilon")):
        out["layernorm_epsilon"] = _value(args.get("norm_epsilon"))
    if args.get("apply_layernorm_1p"):
        out["layernorm_zero_centered_gamma"] = True
    if args.get("disable_bias_linear"):
        out["add_bias_linear"] = False
    heads = out.get("num_attention_heads")
    out["num_query_groups"] = _value(args.get("num_query_groups")) if args.get("group_query_attention") else heads
    out |= {name: default for name, default in CURRENT.defaults.items() if name in wanted and out.get(name) is None}
    if args.get("multi_latent_attention"):
        out.pop("kv_channels", None)  # filled in, and used by no part of latent attention
    gated, activation = next((found for arg, found in _ACTIVATIONS.items() if args.get(arg)), (False, "gelu"))
    out |= {"gated_linear_unit": gated, "activation_func": activation}
    if args.get("num_experts"):
        out["num_moe_experts"] = _value(args["num_experts"])
        if out.get("moe_ffn_hidden_size") is None:
            out["moe_ffn_hidden_size"] = out.get("ffn_hidden_size")
    position = args.get("position_embedding_type", "learned_absolute")
    model: dict[str, object] = {
        "vocab_size": args.get("vocab_size") or args.get("padded_vocab_size"),
        "position_embedding_type": "rope" if args.get("use_rotary_position_embeddings") else position,
        **{name: args.get(arg, CURRENT.defaults.get(f"model.{name}")) for name, arg in _MODEL.items()},
        "rope_scaling": bool(args.get("use_rope_scaling")),
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights"),
    }
    if position == "none":
        model = {name: value for name, value in model.items() if not name.startswith(("rotary", "rope", "seq_len"))}
    if hybrid:
        model["mcore_model"] = "hybrid"
        model["hybrid_override_pattern"] = pattern
    out |= {f"model.{name}": _value(value) for name, value in model.items() if is_plain(value)}
    out = completed(out, args, "the checkpoint's args")
    check_fields(out, "the checkpoint's args")
    return out


def is_silent(args: Mapping[str, object]) -> bool:
    """Whether `args` are those of mcore-bridge (ms-swift), which hold its own settings and no architecture."""
    return args.get("bridge_backend") == "mcore-bridge" or "num_layers" not in args and "model_dir" in args


def layout_of_args(args: Mapping[str, object]) -> Layout:
    """The layout that `args` describe; UsageError where a size is no number."""

    def size(name: str, otherwise: int) -> int:
        value = args.get(name)
        if value is None:
            return otherwise
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"the checkpoint's args say {name} = {value!r}; a size was expected")
        return value

    tp = size("tensor_model_parallel_size", 1)
    pipeline = args.get("pipeline_model_parallel_layout")
    first, last = args.get("decoder_first_pipeline_num_layers"), args.get("decoder_last_pipeline_num_layers")
    return Layout(
        tp=tp,
        pp=size("pipeline_model_parallel_size", 1),
        vocab_divisor=size("make_vocab_size_divisible_by", 1),
        vpp=size("virtual_pipeline_model_parallel_size", 1) if not isinstance(pipeline, str) else 1,
        ep=size("expert_model_parallel_size", 1),
        etp=size("expert_tensor_parallel_size", tp),
        pipeline=pipeline if isinstance(pipeline, str) else None,
        first_stage=first if isinstance(first, int) else None,
        last_stage=last if isinstance(last, int) else None,
    )


def args_of(
    config: Mapping[str, Value], layout: Layout, padded_vocab: int | None, architectures: tuple[str, ...] = ()
) -> dict[str, object]:
    """What Megatron-LM's `--use-checkpoint-args` reads, for a model of `config` under `layout`.

    `architectures` are its Hugging Face classes. Law: `config_of_args(args_of(c, …))` agrees with `c` in every field.
    """
    out: dict[str, object] = {name: config[name] for name in (*FIELDS_OF_BOTH, *_BEYOND_YARN) if name in config}
    activation, gated = config.get("activation_func"), bool(config.get("gated_linear_unit"))
    out |= {
        "num_query_groups": config.get("num_query_groups") or config.get("num_attention_heads"),
        "group_query_attention": config.get("num_query_groups") not in (None, config.get("num_attention_heads")),
        **{arg: activation == name and gated >= is_gated for arg, (is_gated, name) in _ACTIVATIONS.items()},
        "openai_gelu": False,
        "apply_layernorm_1p": bool(config.get("layernorm_zero_centered_gamma")),
        "norm_epsilon": config.get("layernorm_epsilon"),
        "num_experts": config.get("num_moe_experts"),
        "vocab_size": config.get("model.vocab_size"),
        "padded_vocab_size": padded_vocab,
        "seq_length": config.get("model.max_sequence_length"),
        "position_embedding_type": config.get("model.position_embedding_type", "rope"),
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "use_rope_scaling": bool(config.get("model.rope_scaling")),
        **{arg: config.get(f"model.{name}", CURRENT.defaults.get(f"model.{name}")) for name, arg in _MODEL.items()},
        "untie_embeddings_and_output_weights": not config.get("model.share_embeddings_and_output_weights"),
        "hybrid_override_pattern": config.get("model.hybrid_override_pattern"),
        "is_hybrid_model": config.get("model.mcore_model") == "hybrid",
    }
    out[NAME] = statement_of(architectures, config, config_of_args(out))
    return out | layout_args(layout)


def layout_args(layout: Layout) -> dict[str, object]:
    """The args that say how a checkpoint is cut; law: `layout_of_args(layout_args(x))` describes the same cuts."""
    return {
        **sizes_of_both(layout),
        "transformer_pipeline_model_parallel_size": layout.pp,
        "decoder_first_pipeline_num_layers": layout.first_stage,
        "decoder_last_pipeline_num_layers": layout.last_stage,
    }


def sizes_of_both(layout: Layout) -> dict[str, object]:
    """What Megatron-LM and Megatron-Bridge call alike of how a checkpoint is cut."""
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "pipeline_model_parallel_layout": layout.pipeline,
        "make_vocab_size_divisible_by": layout.vocab_divisor,
    }
