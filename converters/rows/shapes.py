"""Shapes that Megatron Core gives its parameters at a config: a config that does not fit the weights is found here.

Source: the module constructors in megatron/core/transformer (attention.py, multi_latent_attention.py, mlp.py, moe/) of
megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import CoverageError
from converters.rows.expr import Env, evaluate, names
from converters.rows.table import Row
from converters.tensors import Shape

_GATED = "(2 if gated_linear_unit else 1)"
_HEADS = "num_attention_heads * (v_head_dim or kv_channels)"
_HIDDEN = ("hidden_size",)
_DELTA_HEADS = "linear_num_value_heads"
_QUERIES = "num_attention_heads * (qk_head_dim + qk_pos_emb_head_dim)"
_WIDTH = "(moe_latent_size or hidden_size)"

#: Parameter, relative to its layer → its dimensions; None where the op already fixes one.
EXPECTED: Mapping[str, tuple[str | None, ...]] = {
    "embedding.word_embeddings.weight": (None, "hidden_size"),
    "embedding.position_embeddings.weight": ("max_sequence_length", "hidden_size"),
    "output_layer.weight": (None, "hidden_size"),
    "per_layer_embedding.weight": ("per_layer_vocab_size", "num_layers * per_layer_input_size"),
    "decoder.final_layernorm.weight": _HIDDEN,
    "decoder.final_layernorm.bias": _HIDDEN,
    "self_attention.linear_qkv.weight": (None, "hidden_size"),
    "self_attention.linear_qkv.bias": (None,),
    "self_attention.linear_qkv.layer_norm_weight": _HIDDEN,
    "self_attention.linear_qkv.layer_norm_bias": _HIDDEN,
    "self_attention.linear_proj.weight": ("hidden_size", _HEADS),
    "self_attention.linear_proj.bias": _HIDDEN,
    "self_attention.linear_proj.post_layernorm.weight": _HIDDEN,
    "self_attention.core_attention.softmax_offset": ("num_attention_heads",),
    "self_attention.in_proj.weight": (None, "hidden_size"),
    "self_attention.in_proj.layer_norm_weight": _HIDDEN,
    "self_attention.out_proj.weight": ("hidden_size", f"{_DELTA_HEADS} * linear_value_head_dim"),
    "self_attention.out_norm.weight": ("linear_value_head_dim",),
    "self_attention.conv1d.weight": (None, "1", "linear_conv_kernel_dim"),
    "self_attention.A_log": (_DELTA_HEADS,),
    "self_attention.dt_bias": (_DELTA_HEADS,),
    "self_attention.linear_q_down_proj.weight": ("q_lora_rank", "hidden_size"),
    "self_attention.linear_q_proj.weight": (_QUERIES, "hidden_size"),
    "self_attention.linear_q_up_proj.weight": (_QUERIES, "q_lora_rank"),
    "self_attention.linear_q_up_proj.layer_norm_weight": ("q_lora_rank",),
    "self_attention.linear_kv_down_proj.weight": ("kv_lora_rank + qk_pos_emb_head_dim", "hidden_size"),
    "self_attention.linear_kv_up_proj.weight": ("num_attention_heads * (qk_head_dim + v_head_dim)", "kv_lora_rank"),
    "self_attention.linear_kv_up_proj.layer_norm_weight": ("kv_lora_rank",),
    "self_attention.q_layernorm.weight": (
        "q_lora_rank if multi_latent_attention else "
        "kv_channels * (num_attention_heads if qk_layernorm_over_heads else 1)",
    ),
    "self_attention.k_layernorm.weight": ("kv_channels * (num_query_groups if qk_layernorm_over_heads else 1)",),
    "self_attention.kv_layernorm.weight": ("kv_lora_rank",),
    "input_layernorm.weight": _HIDDEN,
    "pre_mlp_layernorm.weight": _HIDDEN,
    "mlp.linear_fc1.layer_norm_weight": _HIDDEN,
    "mlp.linear_fc1.layer_norm_bias": _HIDDEN,
    "mlp.linear_fc1.weight": (f"ffn_hidden_size * {_GATED}", "hidden_size"),
    "mlp.linear_fc1.bias": (f"ffn_hidden_size * {_GATED}",),
    "mlp.linear_fc2.weight": ("hidden_size", "ffn_hidden_size"),
    "mlp.linear_fc2.bias": _HIDDEN,
    "mlp.linear_fc2.post_layernorm.weight": _HIDDEN,
    "mlp.router.weight": ("num_moe_experts", "hidden_size"),
    "mlp.router.bias": ("num_moe_experts",),
    "mlp.router.expert_bias": ("num_moe_experts",),
    "mlp.experts.linear_fc1.weight{E}": (f"moe_ffn_hidden_size * {_GATED}", _WIDTH),
    "mlp.experts.linear_fc1.bias{E}": (f"moe_ffn_hidden_size * {_GATED}",),
    "mlp.experts.linear_fc2.weight{E}": (_WIDTH, "moe_ffn_hidden_size"),
    "mlp.experts.linear_fc2.bias{E}": (_WIDTH,),
    "mlp.shared_experts.linear_fc1.weight": (f"moe_shared_expert_intermediate_size * {_GATED}", "hidden_size"),
    "mlp.shared_experts.gate_weight": ("1", "hidden_size"),
    "mlp.shared_experts.linear_fc2.weight": ("hidden_size", "moe_shared_expert_intermediate_size"),
    # diffusion transformers, by Megatron-Bridge's modules
    "patch_embedding.weight": ("hidden_size", "in_channels", "patch_temporal", "patch_spatial", "patch_spatial"),
    "patch_embedding.bias": _HIDDEN,
    "text_embedding.0.weight": ("hidden_size", "text_dim"),
    "text_embedding.2.weight": ("hidden_size", "hidden_size"),
    "time_embedder.linear_1.weight": ("hidden_size", "freq_dim"),
    "time_embedder.linear_2.weight": ("hidden_size", "hidden_size"),
    "time_proj.weight": ("6 * hidden_size", "hidden_size"),
    "head.modulation": ("1", "2", "hidden_size"),
    "head.head.weight": ("out_channels * patch_temporal * patch_spatial * patch_spatial", "hidden_size"),
    "adaLN.modulation": ("1", "6", "hidden_size"),
    "norm3.weight": _HIDDEN,
    "full_self_attention.linear_qkv.weight": (None, "hidden_size"),
    "full_self_attention.linear_proj.weight": ("hidden_size", _HEADS),
    "full_self_attention.q_layernorm.weight": _HIDDEN,
    "full_self_attention.k_layernorm.weight": _HIDDEN,
    "cross_attention.linear_q.weight": (_HEADS, "hidden_size"),
    "cross_attention.linear_kv.weight": (None, "hidden_size"),
    "cross_attention.linear_proj.weight": ("hidden_size", _HEADS),
    "cross_attention.q_layernorm.weight": _HIDDEN,
    "cross_attention.k_layernorm.weight": _HIDDEN,
    "img_embed.weight": ("hidden_size", "in_channels"),
    "txt_embed.weight": ("hidden_size", "context_dim"),
    "vector_embedding.in_layer.weight": ("hidden_size", "vec_in_dim"),
    "norm_out.adaLN_modulation.1.weight": ("2 * hidden_size", "hidden_size"),
    "proj_out.weight": ("patch_size * patch_size * in_channels", "hidden_size"),
    "self_attention.added_linear_qkv.weight": (None, "hidden_size"),
    "self_attention.added_linear_proj.weight": ("hidden_size", _HEADS),
    "self_attention.added_q_layernorm.weight": ("kv_channels",),
    "self_attention.added_k_layernorm.weight": ("kv_channels",),
    "context_mlp.linear_fc1.weight": ("ffn_hidden_size", "hidden_size"),
    "context_mlp.linear_fc2.weight": ("hidden_size", "ffn_hidden_size"),
    "self_attention.linear_proj.weight + mlp.linear_fc2.weight": (f"{_HEADS} + ffn_hidden_size", "hidden_size"),
}
#: Fields that not every config sets, and what stands for them.
_DEFAULTS: Mapping[str, None | bool] = {
    "multi_latent_attention": False,
    "moe_latent_size": None,
    "kv_channels": None,
    "v_head_dim": None,
    "q_lora_rank": None,
    "qk_layernorm_over_heads": False,
}


def expected_shape(row: Row, env: Env) -> tuple[int | None, ...] | None:
    """Dimensions of a row's parameter at the config of `env`; None where nothing is known.

    Heterogeneous models set sizes by layer, so none are expected of them.
    """
    as_it_is = row.spec.op in ("copy", "unpadded") and row.spec.param.endswith(
        "A_log"
    )  # Kimi Linear's has dimensions of 1 around
    wanted = None if row.kept or as_it_is else EXPECTED.get(row.site + row.spec.param) or EXPECTED.get(row.spec.param)
    if wanted is None or env.get("heterogeneous_block_specs"):
        return None
    full = {**_DEFAULTS, **env}
    return tuple(_size(expression, full) for expression in wanted)


def _size(expression: str | None, env: Env) -> int | None:
    if expression is None or any(name not in env for name in names(expression)):
        return None
    # Some attention has a size of its own for the values of a head, other one for all of a head; and none but latent
    # attention projects its queries in two steps.
    absent = {"v_head_dim" if env["v_head_dim"] is None else "kv_channels"}
    if not env["multi_latent_attention"]:
        absent.add("q_lora_rank")
    optional = {"gated_linear_unit", "multi_latent_attention", "moe_latent_size", *absent}
    if any(env[name] is None for name in names(expression) - optional):
        return None
    size = evaluate(expression, env)
    return size if isinstance(size, int) else None


def check_shape(row: Row, shape: Shape, env: Env) -> None:
    """CoverageError when the tensors of `row` do not have the shape their config asks for."""
    wanted = expected_shape(row, env)
    if wanted is None or len(shape) == len(wanted) and all(w in (None, s) for w, s in zip(wanted, shape, strict=True)):
        return
    shown = ", ".join("…" if size is None else str(size) for size in wanted)
    raise CoverageError(
        f"{', '.join(f'`{name}`' for name in row.hf)}: together of shape {list(shape)} in `{row.mcore}`, "
        f"but the config asks for [{shown}]",
        hint="config.json does not belong to these weights, or a tensor is transposed or cut",
    )
