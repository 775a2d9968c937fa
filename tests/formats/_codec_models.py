"""Small models of four families whose products all codecs take: dense, of experts, of latent attention, of norms with
an offset."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_SMALL = {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
_EXPERTS = {"intermediate_size": 256, "moe_intermediate_size": 128, "num_experts_per_tok": 2}


def _deepseek() -> PreTrainedModel:
    ranks = {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    router = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    few = {**_SMALL, **_EXPERTS, **ranks, **router, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**few, num_nextn_predict_layers=0))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, intermediate_size=384, num_key_value_heads=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SMALL, **_EXPERTS, num_key_value_heads=2, num_experts=4)
    ),
    "deepseek_v3": _deepseek,
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SMALL, intermediate_size=384, num_key_value_heads=2, query_pre_attn_scalar=32)
    ),
}
