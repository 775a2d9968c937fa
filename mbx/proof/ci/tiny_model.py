"""A small model of an architecture, made by Transformers with drawn weights: `mbx verify ci` checks tables on it.

Transformers begins with norms of ones, biases of zero and weights so small that most mechanisms stay below rounding.
Here every value is drawn away from what would hide the row that it belongs to.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from converters.rows.table import Table

if TYPE_CHECKING:
    import torch

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
#: Vectors below this came from Transformers' initial spread of 0.02.
_FAINT = 0.2
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_small(table: Table, folder: Path) -> Path:
    """Write a small bf16 model of the table's first model type that Transformers can make into `folder`.

    The weights come from a fixed seed, and none is neutral. Raises UnsupportedError where Transformers makes none.
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
                draw(model)
                model.to(torch.bfloat16).save_pretrained(folder)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            reasons.append(f"{kind}: {str(error)[:100]}")
            continue
        return folder
    raise UnsupportedError(f"Transformers makes no small model for table `{table.name}`", details=reasons)


def draw(model: torch.nn.Module) -> None:
    """Draw every parameter and stored buffer of `model` away from neutral values.

    Matrices keep activations near one; constants (norms of ones, biases and gains of zero) get a spread around their
    value; other vectors, as sinks, are drawn in a size that shows.
    """
    import torch

    stored = model.state_dict(keep_vars=True)
    done = set[int]()
    with torch.no_grad():
        for tensor in stored.values():
            if not tensor.is_floating_point() or tensor.data_ptr() in done:
                continue  # tied to one that is drawn
            done.add(tensor.data_ptr())
            noise = torch.randn_like(tensor, dtype=torch.float32)
            first = float(tensor.flatten()[0]) if tensor.numel() else 0.0
            if tensor.dim() > 1:
                tensor.copy_(noise / math.sqrt(min(tensor.shape[-2:])))
            elif bool((tensor == first).all()):
                tensor.copy_(first + (0.2 if first else 0.1) * noise)
            elif float(tensor.abs().max()) < _FAINT:
                tensor.copy_(0.3 * noise)
