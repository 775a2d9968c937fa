"""Families with experts and hybrids whose logits are worth a GPU run with Transformer Engine, and why."""

from __future__ import annotations

#: (tiny checkpoint, config.json keys over it, what Transformer Engine does there that the local spec does not).
FORWARD_FAMILIES_MOE: tuple[tuple[str, dict[str, object], str], ...] = (
    ("qwen3_next", {}, "gated delta nets build with Transformer Engine only"),
    ("qwen3_5_text", {}, "gated delta nets build with Transformer Engine only"),
    ("qwen3_5_moe_text", {}, "gated delta nets build with Transformer Engine only"),
    ("nemotron_h", {}, "hybrid models build with Transformer Engine only"),
    ("nemotron_nano_v2", {}, "hybrid models build with Transformer Engine only"),
    ("nemotron_nano_v3", {}, "hybrid models build with Transformer Engine only; expert layers inside one"),
    ("qwen3_moe", {}, "grouped expert matrices and the all-to-all dispatcher"),
    ("gpt_oss", {}, "sinks, windows and the clamped activation are kernel arguments"),
    ("deepseek_v2", {}, "norms fused into the latent up-projections"),
    # Two experts a group, as in the real model: Megatron Core ranks groups by topk // topk_group of them.
    ("deepseek_v3", {"num_experts_per_tok": 4}, "norms fused into the latent up-projections, a prediction layer"),
    ("glm4_moe", {}, "a prediction layer behind expert layers with biases and query norms"),
)
