"""A small model of an architecture, made by Transformers with drawn weights: `mbx verify ci` checks tables on it."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from converters.rows.table import Table

#: Sizes of the small model; of these a config takes what it has.
_SMALL: dict[str, Value] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 16,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_small(table: Table, folder: Path) -> Path:
    """Write a small bf16 model of the table's first model type that Transformers can make into `folder`.

    The weights come from a fixed seed. Raises UnsupportedError where Transformers makes none.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, __version__

    from mbx.models.transformers.reference import silent_transformers

    known = [kind for kind in table.model_types if kind in CONFIG_MAPPING]
    if not known:
        raise UnsupportedError(
            f"not possible: transformers {__version__} has no model of type {' or '.join(table.model_types)}, "
            f"so there is no small model for table `{table.name}`",
            hint="give a checkpoint as the source; without a class all legs but forward and loss can run",
        )
    reasons = []
    for kind in known:
        try:
            usual = AutoConfig.for_model(kind)
            chosen = {name: value for name, value in _SMALL.items() if hasattr(usual, name)}
            chosen |= {name: None for name in _TOKENS if hasattr(usual, name)}
            config = AutoConfig.for_model(kind, **chosen)
            with torch.random.fork_rng(devices=[]), silent_transformers():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
                model.to(torch.bfloat16).save_pretrained(folder)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            reasons.append(f"{kind}: {str(error)[:100]}")
            continue
        return folder
    raise UnsupportedError(f"Transformers makes no small model for table `{table.name}`", details=reasons)
