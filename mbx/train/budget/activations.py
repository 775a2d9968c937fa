"""What a step keeps and needs beside weights and optimizer, in bytes, phase by phase.

T is the tokens of a micro-batch on this rank. docs/training-figures.md has the derivation and the measured errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.mcore.keys import EMBEDDING, HEAD
from mbx.train.budget.adapters import pairs_of, pairs_of_output
from mbx.train.budget.counts import layers_of
from mbx.train.budget.layers import Layer
from mbx.train.budget.load import Load
from mbx.train.budget.mixers import mixer
from mbx.train.budget.mlps import fused, mlp, routed
from mbx.train.model.config import gpu_config
from mbx.train.model.trained_whole import whole_layers

#: The phase in which the output layer's gradient is computed.
OUTPUT = "the output layer"


def kept(load: Load, layer: Layer) -> int:
    """What one layer keeps for its backward pass."""
    s, load = load.shape, load.at(layer)
    sublayers = bool(layer.mixer) + bool(layer.mlp)
    dropped = sublayers * s.hidden / load.cut if s.dropout else 0.0  # masks, one byte an element
    own = mixer(load, layer) + mlp(load, layer) + dropped + _layer_input(load)
    return round(load.tokens * own) + _adapters(load, layer)


def _layer_input(load: Load) -> float:
    """What a layer that takes something of each token keeps of it: the gate's input, its output before and behind the
    activation, the layer's share of all such inputs before and behind their norm, the product, a norm's input."""
    s, b = load.shape, load.b
    return (2 * s.hidden + 5 * s.layer_input) * b / load.cut if s.layer_input else 0.0


def _adapters(load: Load, layer: Layer) -> int:
    """What adapters keep in a layer: the ranks between A and B; DoRA's bare outputs; and, where the adapter's products
    stand beside the base's (`mbx.train.lora.product` does not fit), the joined B's of fused weights."""
    lora, b = load.recipe.lora, load.b
    beside = load.tp > 1 or load.fp8 or lora.dora or lora.dropout > 0
    total = 0.0
    for pairs in pairs_of(load.recipe, load.plan, load.shape, layer, load.known):
        tokens = load.tokens * pairs.topk
        total += tokens * pairs.ranks * b
        if len(pairs.parts) > 1 and beside:
            total += pairs.outputs * pairs.ranks * b
        if lora.dora:
            total += tokens * pairs.outputs / (load.cut if pairs.row_parallel else 1) * b
    return round(total)


def within(load: Load, layer: Layer) -> int:
    """The most that is alive at once in a layer's backward pass beside what it kept: gradients of activations.

    A product's incoming gradient lies beside the one it makes; with it the weight's gradient, whole, before it is
    added to the fp32 buffer.
    """
    if layer.mixer == "delta":
        return max(_rule(load), _within_mlp(load, layer))
    return _within_mlp(load, layer)


def _rule(load: Load) -> int:
    """The gated delta rule's backward pass (fla/ops/gated_delta_rule/chunk.py): w, u, the new v, gradients of q, k, v,
    w and the output, and states of chunks of 64 tokens with their gradients."""
    d = load.shape.delta
    assert d is not None
    keys = d.heads * d.key // d.key_heads
    states = 2 * keys * d.head / 64
    return round(load.tokens * load.b * (4 * keys + 5 * d.value + states) / load.tp)


def _within_mlp(load: Load, layer: Layer) -> int:
    s, b, p = load.shape, load.b, load.recipe.parallel
    trained = 0 if load.frozen else b
    part = s.hidden * b / load.cut
    if layer.mlp == "experts":
        first = s.up * s.expert_ffn / p.etp
        rows = routed(load) * b * max(first + s.expert_hidden, first + s.expert_ffn / p.etp)
        weight = s.experts // p.ep * first * s.expert_hidden * trained
        return round(load.tokens * (rows + 2 * part) + weight)
    if layer.mlp == "dense":
        width = s.up + (2 if s.gated and not fused(load) else 1)  # apart, the halves' gradients are joined
        return round(load.tokens * (width * layer.ffn * b / p.tp + 2 * part)) + round(
            s.up * layer.ffn * s.hidden / p.tp * trained
        )
    rows = layer.heads.rows
    if s.mamba is not None and layer.mixer == "mamba":
        rows = s.mamba.rows
    return round(load.tokens * (2 * rows * b / p.tp + 2 * part) + rows * s.hidden / p.tp * trained)


def phases(load: Load, stage: int, dp: int) -> dict[str, Mapping[str, int]]:
    """Moments at which a step of pipeline `stage` may be largest, each with its parts.

    Without recomputation that is the output layer's backward pass, where every layer is kept, the logits have become
    their gradient and the output weight's gradient lies beside them. With it, the logits are gone before a layer is
    computed again; the larger of the two counts.
    """
    s, p, b = load.shape, load.recipe.parallel, load.b
    last, full = stage == p.pp - 1, load.recipe.train.recompute == "full"
    saved = whole_layers(load.recipe.lora, load.plan)
    head_trained, embedding_trained = (not load.frozen or saved.holds(name) for name in (HEAD, EMBEDDING))
    whole = load.tokens * s.hidden * b
    part = whole // load.cut
    mine = layers_of(s, p.pp, stage)
    ahead = s.ahead if last else ()
    one = part * len(mine) if full else sum(kept(load, layer) for layer in mine)
    stored = round(one * chunks_in_flight(load, stage, dp))
    further = sum(kept(load, layer) + 5 * part for layer in ahead)  # two norms, their joined outputs, the last norm
    handed = 2 * part if p.pp > 1 else 0
    gathered = whole if load.cut > 1 else 0
    found: dict[str, Mapping[str, int]] = {}
    if last:
        # the output layer's input is kept for its weight's gradient, or its adapter's; the final norm keeps its own
        adapter = pairs_of_output(load.recipe, load.plan, s, load.known)
        between = load.tokens * adapter.ranks * b if adapter else 0
        head = whole + (load.plan.padded_vocab // p.tp * s.hidden * b if head_trained else 0)
        found[OUTPUT] = {
            "activations": stored + further + part * (2 if head_trained or adapter else 1) + between,
            "logits": logits(load) * (1 + len(ahead)),
            "output layer": head,
            "communication": gathered + handed,
        }
    found["a layer"] = {
        "activations": stored + max(((kept(load, layer) if full else 0) for layer in mine), default=0),
        "gradients within a layer": max(within(load, layer) for layer in _last(mine, full)),
        "communication": 2 * gathered + handed,
    }
    if stage == 0 and embedding_trained:
        rows = load.plan.padded_vocab // p.tp * s.hidden * b
        if not load.frozen:
            rows += s.layer_vocab // p.tp * s.layer_input * len(s.layers) * b
        others = max(0, stored - one)
        found["the embedding"] = {"activations": others + part, "embedding": rows, "communication": gathered + handed}
    return found


def in_flight(load: Load, stage: int, dp: int) -> int:
    """Bytes that micro-batches hold which are under way when a stage begins another one."""
    p, full = load.recipe.parallel, load.recipe.train.recompute == "full"
    mine = layers_of(load.shape, p.pp, stage)
    part = load.tokens * load.shape.hidden * load.b // load.cut
    one = part * len(mine) if full else sum(kept(load, layer) for layer in mine)
    return round(one * max(0.0, chunks_in_flight(load, stage, dp) - 1))


def _last(mine: Sequence[Layer], full: bool) -> Sequence[Layer]:
    """Layers whose backward pass may be the largest moment: any that is computed again, else the last of each kind."""
    kinds = {(layer.mixer, layer.mlp, layer.ffn, layer.heads): layer for layer in mine[-2:]}
    return mine if full else tuple(kinds.values())


def logits(load: Load) -> int:
    """Logits at the output layer: the fused loss turns them into their gradient in place.

    Otherwise an fp32 copy becomes the softmax and then the gradient, which is cast beside it
    (megatron/core/tensor_parallel/cross_entropy.py).
    """
    fused = {**gpu_config(load.plan.config), **load.plan.config}["cross_entropy_loss_fusion"]
    fused = fused or load.recipe.distill.teacher  # whose loss takes the place of either
    return load.tokens * load.plan.padded_vocab // load.recipe.parallel.tp * (load.b if fused else load.b + 4)


def chunks_in_flight(load: Load, stage: int, dp: int) -> float:
    """Micro-batches that a stage keeps at once, in whole stages: 1F1B, interleaved where it holds several chunks."""
    p, t = load.recipe.parallel, load.recipe.train
    micro_batches = t.global_batch // (t.micro_batch * dp)
    if p.vpp == 1:
        return min(p.pp - stage, micro_batches)
    chunks = (p.pp - stage - 1) * 2 + (p.vpp - 1) * p.pp + 1
    return min(chunks, micro_batches * p.vpp) / p.vpp
