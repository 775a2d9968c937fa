"""What MLPs and experts keep for their backward pass, in bytes a token of a micro-batch.

Facts of Megatron Core 0.16.1: `transformer/mlp.py`, and of `transformer/moe/` the router, the all-gather dispatcher
(which Megatron Core takes unless told otherwise) and `TEGroupedMLP`.
"""

from __future__ import annotations

from mbx.installed import core_release
from mbx.train.budget.layers import Layer
from mbx.train.budget.load import Load
from mbx.train.model.config import gpu_config

#: Bytes of an index.
_INDEX = 8


def mlp(load: Load, layer: Layer) -> float:
    """Bytes a token that a layer's MLP keeps, with the norm in front of it."""
    if layer.mlp == "experts":
        return experts(load, layer)
    if not layer.mlp:
        return 0.0
    s, b = load.shape, load.b
    own = 0.0 if s.one_norm else b + load.seen("linear_fc1", normed=True)  # else it reads attention's
    norms = s.hidden * own / load.cut
    inner = layer.ffn * (activation(load, layer.bounded[1]) * b + load.seen("linear_fc2")) / load.tp
    return norms + inner + (s.hidden * b / load.cut if s.post_norms else 0)


def activation(load: Load, bounded: bool, *, weighed: bool = False) -> int:
    """Widths of an MLP that the activation keeps; `weighed`: its output is multiplied by a probability, `bounded`:
    the product's output is bounded first, which keeps what it bounds.

    The fused SwiGLU keeps the first product's output alone, weighed or not. Otherwise a gated activation keeps that
    output, its own and the other half with its offset, where both halves are bounded first the bounded gate too; a
    plain one its input. A product with probabilities that is a kernel of its own keeps what it multiplies.
    """
    s = load.shape
    before = s.up if bounded else 0
    if fused(load):
        return before + s.up
    kept = before + s.up + (2 + (1 if s.clamped else 0) if s.gated else 0)
    return kept + (1 if weighed else 0)


def fused(load: Load) -> bool:
    """Whether activation, bias and probabilities are one kernel."""
    config = {**gpu_config(load.plan.config), **load.plan.config}
    return bool(config.get("bias_activation_fusion"))


def experts(load: Load, layer: Layer) -> float:
    """A norm's input and output (the router's input), the router, the shared expert, and the routed ones.

    Tokens are taken to spread evenly over the experts.
    """
    s, b = load.shape, load.b
    norms = 2 * s.hidden * b / load.cut
    if s.norms_beside:  # inputs of three norms behind; the router's own norm, in fp32, and its output; scaled shares
        norms += (4 * s.hidden * b + 4 * (s.hidden + 1) + s.experts * b) / load.cut
    shared = 0.0
    if s.shared_ffn:
        # the router keeps the input as it is
        shared = s.hidden * load.seen("linear_fc1", held=not s.norms_beside) / load.cut
        shared += s.shared_ffn * (activation(load, layer.bounded[1]) * b + load.seen("linear_fc2")) / load.tp
        shared += (s.hidden * b + b) / load.cut if s.shared_gate else 0
    if s.expert_hidden != s.hidden:  # products to the experts' width and back
        shared += s.hidden * load.seen("fc1_latent_proj", held=True) / load.cut
        shared += s.expert_hidden * load.seen("fc2_latent_proj") / load.cut
    width = s.expert_ffn * (activation(load, layer.bounded[0], weighed=True) * b + load.seen("linear_fc2"))
    inputs = s.expert_hidden * (load.seen("linear_fc1") + (b if s.routing.on_input else 0))
    return norms + shared + router(load) / load.cut + routed(load) * (width / load.recipe.parallel.etp + inputs)


def routed(load: Load) -> float:
    """Rows that a rank's experts compute a token of its micro-batch: every token meets top-k of them."""
    return load.shape.topk * load.recipe.parallel.etp / load.cut


def router(load: Load) -> float:
    """Scores, choices and the dispatcher's maps, a token.

    Scores in fp32: of all experts (softmax before the choice, or sigmoid), else of the chosen; what a sum divides. The
    auxiliary loss keeps its own. The dispatcher keeps a map of bools, probabilities of all experts, those of the rows
    and their order.
    """
    s = load.shape
    r, probability = s.routing, 4 if s.routing.fp32 else load.b
    scores = 4.0 * (s.experts if r.sigmoid or r.pre_softmax else s.topk) + _INDEX * s.topk
    if r.sigmoid and s.topk > 1:
        scores += probability * (s.topk + 1)
    if r.auxiliary:
        own = 4 if core_release().wide_balance else probability
        scores += own * (s.experts + 1) if r.sigmoid else 4 * s.experts
    return scores + s.experts * (probability + 1) + s.topk * (probability + _INDEX)
