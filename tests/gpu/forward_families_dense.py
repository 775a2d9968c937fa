"""Dense families whose logits are worth a GPU run with Transformer Engine, and why; the rest agrees on a CPU."""

from __future__ import annotations

#: (tiny checkpoint, config.json keys over it, what Transformer Engine does there that the local spec does not).
FORWARD_FAMILIES_DENSE: tuple[tuple[str, dict[str, object], str], ...] = (
    ("mistral", {"sliding_window": 8}, "the sliding window is a kernel argument, not a mask"),
    ("nemotron", {}, "LayerNorm with gamma - 1 and bias, fused into the projections"),
    ("qwen3", {}, "norms of query and key heads are TENorm, with an _extra_state each"),
    ("glm", {}, "rotary pairs lie side by side"),
    ("phi3", {"sliding_window": 8}, "the sliding window is a kernel argument, not a mask"),
    ("smollm3", {}, "layers without rotary embedding beside layers with it"),
    ("seed_oss", {}, "bias on the fused query, key and value projection"),
    ("mimo", {}, "which _extra_state the prediction head asks for is Transformer Engine's own choice"),
)
