"""What a step keeps and needs beside weights and optimizer, in bytes, phase by phase.

Facts of Megatron Core 0.16.1 with Transformer Engine 2.11, read from their sources and from memory snapshots at the
peak (docs/training.md). b is bytes an element, T the tokens of a micro-batch on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mbx.train.budget.adapters import pairs_of
from mbx.train.budget.shape import Shape
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.config import gpu_config
from mbx.train.recipe.sections import Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Bytes of an element cast to FP8, with its scales: one a 128 elements (fp32) in blocks, one a 32 (one byte) in MXFP8.
_CAST = {"delayed": 1.0, "tensorwise": 1.0, "blockwise": 1 + 4 / 128, "mxfp8": 1 + 1 / 32}
#: Products that read the norm in front of attention.
_BEHIND_NORM = ("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj")


@dataclass(frozen=True, slots=True)
class Load:
    """What activations are counted from: the recipe, the sizes, the tokens of a micro-batch on this rank."""

    recipe: Recipe
    plan: Blueprint
    shape: Shape
    tokens: int

    @property
    def b(self) -> int:
        """Bytes of an element of activations."""
        return BYTES[self.recipe.train.precision]

    @property
    def cast(self) -> float:
        """Bytes of an element of a product's input as it is kept for the weight's gradient."""
        return _CAST.get(self.recipe.fp8.recipe, float(self.b))

    @property
    def fp8(self) -> bool:
        """Whether the decoder's products run in FP8."""
        return self.recipe.fp8.recipe != "none"

    @property
    def frozen(self) -> bool:
        """Whether the base's weights take no gradients."""
        return self.recipe.lora.rank > 0

    @property
    def cut(self) -> int:
        """Ranks that share the tokens outside of the products: tp under sequence parallelism."""
        p = self.recipe.parallel
        return p.tp if p.sequence_parallel else 1


def layer(load: Load) -> int:
    """What one layer keeps for its backward pass.

    Twice a norm's input and output; rotated q and k, v, the attention's output and softmax statistics; the first
    product's output and the activation's. FP8 keeps the inputs of products cast, but for the attention's output,
    which attention keeps anyway (`save_original_input`; the delayed recipe cannot).
    """
    s, tp, b = load.shape, load.recipe.parallel.tp, load.b
    targets = load.recipe.lora.targets if load.frozen else ()
    products = 2.0 * load.cast  # outputs of the norms, as the products behind them keep them
    if load.frozen:  # for an adapter only: uncast, beside Transformer Engine's cast copy
        adapted = bool(set(targets) & set(_BEHIND_NORM)) + ("linear_fc1" in targets)
        products = adapted * (b + (load.cast if load.fp8 else 0.0))
    norms = s.hidden * (2 * b + products) / load.cut
    attention: float = (2 * s.q + 2 * s.kv) * b + 4 * s.heads + ((s.q + s.kv) * b if s.qk_norm else 0)
    if load.recipe.train.recompute == "selective":  # attention keeps its inputs, v as a view of the whole product
        attention += (s.q + s.kv) * b - 4 * s.heads
    attention += s.q * load.cast if load.recipe.fp8.recipe == "delayed" and not load.frozen else 0
    dropped = 2 * s.hidden / load.cut if s.dropout else 0.0  # masks, one byte an element
    if s.experts:
        width, ranks = s.topk * s.expert_ffn + s.shared_ffn, load.recipe.parallel.etp
        routed = s.topk * s.hidden * (b + load.cast)
    else:
        width, ranks, routed = s.ffn, tp, 0.0
    second = load.cast if not load.frozen else (b if "linear_fc2" in targets else 0)  # input of the second product
    mlp = width * (s.up * b + second) / ranks + routed
    return round(load.tokens * (norms + attention / tp + dropped + mlp)) + _adapter(load)


def _adapter(load: Load) -> int:
    """What adapters keep in a layer: the ranks between A and B; DoRA's bare outputs; and, where the adapter's products
    stand beside the base's (`mbx.train.lora.product` does not fit), the joined B's of fused weights."""
    lora, b = load.recipe.lora, load.b
    beside = load.recipe.parallel.tp > 1 or load.fp8 or lora.dora or lora.dropout > 0
    total = 0.0
    for pairs in pairs_of(load.recipe, load.shape, dense=not load.shape.experts):
        tokens = load.tokens * pairs.topk
        total += tokens * pairs.atoms * lora.rank * b
        if pairs.atoms > 1 and beside:
            total += pairs.outputs * pairs.atoms * lora.rank * b
        if lora.dora:
            total += tokens * pairs.outputs / (load.cut if pairs.row_parallel else 1) * b
    return round(total)


def phases(load: Load, stage: int, dp: int) -> dict[str, Mapping[str, int]]:
    """Moments at which a step of pipeline `stage` may be largest, each with its parts.

    Without recomputation that is the output layer's backward pass, where every layer is kept, the logits have become
    their gradient and the output weight's gradient lies beside them. With it, the logits are gone before a layer is
    computed again; the larger of the two counts.
    """
    s, p, t, b = load.shape, load.recipe.parallel, load.recipe.train, load.b
    last, trained = stage == p.pp - 1, not load.frozen
    whole = load.tokens * s.hidden * b
    part = whole // load.cut
    full = t.recompute == "full"
    kept, held = part if full else layer(load), _layers_in_flight(load, stage, dp)
    stored = held * kept
    handed = 2 * part if p.pp > 1 else 0
    gathered = whole if load.cut > 1 else 0
    width = (s.topk * s.expert_ffn + s.shared_ffn) if s.experts else s.ffn
    found: dict[str, Mapping[str, int]] = {}
    if last:
        # the output layer's input is kept for its weight's gradient; the final norm keeps its own input
        head = whole + (load.plan.padded_vocab // p.tp * s.hidden * b if trained else 0)
        found["the output layer"] = {
            "activations": stored + part * (2 if trained else 1),
            "logits": logits(load),
            "output layer": head,
            "communication": gathered + handed,
        }
    found["a layer"] = {
        "activations": stored + (layer(load) if full else 0),
        "gradients within a layer": (s.up + 1) * width * load.tokens * b // p.tp
        + 2 * part
        + (s.up * s.ffn * s.hidden * b // p.tp if trained else 0),
        "communication": 2 * gathered + handed,
    }
    if stage == 0 and trained:
        others = max(0, held - s.layers // p.pp) * kept
        rows = load.plan.padded_vocab // p.tp * s.hidden * b
        found["the embedding"] = {"activations": others + part, "embedding": rows, "communication": gathered + handed}
    return found


def logits(load: Load) -> int:
    """Logits at the output layer: the fused loss turns them into their gradient in place.

    Otherwise an fp32 copy becomes the softmax and then the gradient, which is cast beside it
    (megatron/core/tensor_parallel/cross_entropy.py).
    """
    fused = {**gpu_config(load.plan.config), **load.plan.config}["cross_entropy_loss_fusion"]
    return load.tokens * load.plan.padded_vocab // load.recipe.parallel.tp * (load.b if fused else load.b + 4)


def _layers_in_flight(load: Load, stage: int, dp: int) -> int:
    """Layers times micro-batches that a stage keeps at once: 1F1B, interleaved where stages hold several chunks."""
    p, t = load.recipe.parallel, load.recipe.train
    micro_batches = t.global_batch // (t.micro_batch * dp)
    if p.vpp == 1:
        return min(p.pp - stage, micro_batches) * (load.shape.layers // p.pp)
    chunks = (p.pp - stage - 1) * 2 + (p.vpp - 1) * p.pp + 1
    return min(chunks, micro_batches * p.vpp) * (load.shape.layers // (p.pp * p.vpp))
