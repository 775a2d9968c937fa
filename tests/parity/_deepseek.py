"""A tiny dense DeepSeek-V3 in both frameworks with the same weights, matched by hand: an oracle for MLA on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mbx.models.megatron.build import build_model
from mbx.models.megatron.config import FlatConfig
from tests.oracles import mcore_logits

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

LAYERS, HIDDEN, HEADS, FFN, VOCAB = 2, 64, 4, 96, 256
Q_RANK, KV_RANK, D_NOPE, D_ROPE, D_VALUE = 24, 32, 16, 8, 12

CONFIG: FlatConfig = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": FFN,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "qk_layernorm": True,
    "multi_latent_attention": True,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "qk_head_dim": D_NOPE,
    "qk_pos_emb_head_dim": D_ROPE,
    "v_head_dim": D_VALUE,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "model.rotary_base": 10000.0,
    "model.vocab_size": VOCAB,
    "model.max_sequence_length": 512,
    "model.position_embedding_type": "rope",
}

_LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
}


def both_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of Megatron Core and of Transformers; call inside a process group."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 24))
    hf = _transformers_model()
    model = build_model(CONFIG)
    model.load_state_dict(_by_hand(hf.state_dict()), strict=True)
    with torch.no_grad():
        return mcore_logits(model, ids, vocab_size=VOCAB), hf(ids).logits


def _transformers_model() -> DeepseekV3ForCausalLM:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=Q_RANK,
        kv_lora_rank=KV_RANK,
        qk_nope_head_dim=D_NOPE,
        qk_rope_head_dim=D_ROPE,
        v_head_dim=D_VALUE,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is skipped or swapped
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def _by_hand(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(LAYERS):
        to, at = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        state |= {f"{to}{mcore}.weight": hf[f"{at}{name}.weight"] for mcore, name in _LAYER_NAMES.items()}
        gate, up = hf[f"{at}mlp.gate_proj.weight"], hf[f"{at}mlp.up_proj.weight"]
        state[f"{to}mlp.linear_fc1.weight"] = torch.cat([gate, up])
    return state
