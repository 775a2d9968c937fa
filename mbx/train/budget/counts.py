"""Parameters that a rank holds of a decoder, counted as Megatron Core builds its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.mcore.keys import EMBEDDING, HEAD
from mbx.train.budget.adapters import chosen, pairs_of, pairs_of_output
from mbx.train.budget.layers import Heads, Layer
from mbx.train.budget.shape import Shape, shape_of
from mbx.train.model.adapted import Linear
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.trained_whole import whole_layers
from mbx.train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of one rank. `linears` are the decoder's products (what FP8 copies); `adapters` are LoRA's; `whole`
    are those of the base that are trained beside them.

    `experts`: those that belong to experts, which are shared out over other ranks than the rest; `normed`: products
    with a norm in front of them in one module; `matrices`: what Muon steps; all are part of the others.
    """

    embedding: int
    output: int
    linears: int
    others: int
    adapters: int
    experts: int = 0
    normed: int = 0
    whole: int = 0
    matrices: int = 0

    @property
    def base(self) -> int:
        """Everything but adapters."""
        return self.embedding + self.output + self.linears + self.others


def layers_of(s: Shape, pp: int, stage: int) -> Sequence[Layer]:
    """Layers of a pipeline stage."""
    per_stage = len(s.layers) // pp
    return s.layers[stage * per_stage : (stage + 1) * per_stage]


def count(recipe: Recipe, plan: Blueprint, stage: int, known: Mapping[str, Linear] | None = None) -> Counts:
    """Parameters that a rank of pipeline `stage` holds, exactly as Megatron Core builds them.

    `known` are the model's adapted linears, found here where they are not given.
    """
    s, p = shape_of(plan.config), recipe.parallel
    first, last = stage == 0, stage == p.pp - 1
    mine, ahead = layers_of(s, p.pp, stage), s.ahead if last else ()
    rows = plan.padded_vocab // p.tp * s.hidden
    # multi-token prediction embeds tokens again; so does the last stage where the embedding is the output layer
    embedding = (rows + s.positions * s.hidden) if first or ahead else 0
    output = rows if last and (not s.tied or (p.pp > 1 and not ahead)) else 0
    linears = others = experts = 0
    for layer in (*mine, *ahead):
        mixing, beside = _mixer(s, layer, p.tp)
        mlp, rest, own = _mlp(s, layer, recipe)
        linears, others, experts = linears + mixing + mlp, others + beside + rest, experts + own
    norm = s.norm_terms * s.hidden
    if s.layer_input:  # gates and projections of layers, and what makes all of their inputs of tokens
        whole_width = s.layer_input * len(s.layers)
        others += len(mine) * (2 * s.layer_input * s.hidden + norm)
        if first:
            embedding += s.layer_vocab // p.tp * whole_width
            others += whole_width * s.hidden + s.norm_terms * s.layer_input
    linears += len(ahead) * 2 * s.hidden * s.hidden // p.tp  # eh_proj
    others += (norm if last else 0) + 3 * norm * len(ahead)
    known = chosen(recipe, plan) if known is None else known
    pairs = [one for layer in mine for one in pairs_of(recipe, plan, s, layer, known)]
    if last and (of_output := pairs_of_output(recipe, plan, s, known)):
        pairs.append(of_output)
    adapters = sum(one.parameters(recipe.lora.dora) for one in pairs)
    normed = sum(_normed(s, layer, p.tp) for layer in (*mine, *ahead))
    saved = whole_layers(recipe.lora, plan)
    whole = (rows if embedding and saved.holds(EMBEDDING) else 0) + (output if saved.holds(HEAD) else 0)
    matrices = linears + sum(_small(s, layer) for layer in (*mine, *ahead))
    matrices += s.layer_input * len(s.layers) * s.hidden if s.layer_input and first else 0
    return Counts(embedding, output, linears, others, adapters, experts, normed, whole, matrices)


def _small(s: Shape, layer: Layer) -> int:
    """Matrices of a layer that are no products: a router, the gate of a shared expert, those of the layer's input."""
    router = s.experts * s.hidden + (s.hidden if s.shared_gate else 0) if layer.mlp == "experts" else 0
    return router + 2 * s.layer_input * s.hidden


def _normed(s: Shape, layer: Layer, tp: int) -> int:
    """Weights of a layer's products that have their norm in front of them in one module."""
    if s.one_norm:  # it stays a module of its own
        return 0
    inputs = {
        "attention": _qkv(s, layer.heads),
        "delta": s.delta.rows if s.delta else 0,
        "mamba": s.mamba.rows if s.mamba else 0,
    }
    first = inputs.get(layer.mixer, 0) + (s.up * layer.ffn if layer.mlp == "dense" else 0)
    latents = 0
    if layer.mixer == "latent" and s.latent is not None and s.qk_norm:
        m = s.latent
        latents = m.kv * layer.heads.count * (m.head + m.value) + m.q * layer.heads.q
    return (first * s.hidden + latents) // tp


def _mixer(s: Shape, layer: Layer, tp: int) -> tuple[int, int]:
    """Products and other parameters of a layer's mixer on a rank, the norm in front of it included."""
    if not layer.mixer:
        return 0, 0
    norm, h = s.norm_terms * s.hidden, layer.heads
    if layer.mixer == "mamba":
        assert s.mamba is not None
        mixed = 5 * s.mamba.mixed + 3 * s.mamba.heads + s.mamba.inner
        return (s.mamba.rows + s.mamba.inner) * s.hidden // tp, norm + mixed // tp
    if layer.mixer == "delta":
        assert s.delta is not None
        d = s.delta
        own = (d.kernel * d.mixed + 2 * d.heads) // tp + s.norm_terms * d.head
        return (d.rows + d.value) * s.hidden // tp, norm + own
    norm *= 2 if s.post_norms else 1
    if layer.mixer == "latent":
        assert s.latent is not None
        m = s.latent
        queries = h.q
        linears = m.q * s.hidden + queries * m.q // tp if m.q else queries * s.hidden // tp
        linears += (m.kv + m.rotary) * s.hidden  # projections to the latents are whole on every rank
        linears += h.count * (m.head + m.value) * m.kv // tp + h.out * s.hidden // tp
        return linears, norm + (s.norm_terms * (m.q + m.kv) if s.qk_norm else 0)
    rows = _qkv(s, h)
    normed = (h.q + h.k) // tp if s.qk_norm_wide else (1 if h.shares else 2) * h.width
    others = (s.norm_terms * normed if s.qk_norm else 0) + (rows // tp if s.qkv_bias else 0)
    others += (s.hidden if s.bias else 0) + (h.count // tp if h.sinks else 0)
    return (rows + h.out) * s.hidden // tp, norm + others


def _qkv(s: Shape, heads: Heads) -> int:
    """Rows of the product that makes queries, their gates, keys and values."""
    return heads.rows + (heads.q if s.output_gate else 0)


def _mlp(s: Shape, layer: Layer, recipe: Recipe) -> tuple[int, int, int]:
    """Products, other parameters (the norm in front included), and how many of both are the experts'."""
    p, norm = recipe.parallel, 0 if s.one_norm else s.norm_terms * s.hidden
    if not layer.mlp:
        return 0, 0, 0
    if layer.mlp == "dense":
        biases = s.up * layer.ffn // p.tp + s.hidden if s.bias else 0
        return (s.up + 1) * layer.ffn * s.hidden // p.tp, norm * (2 if s.post_norms else 1) + biases, 0
    own = s.experts // p.ep
    products = own * (s.up + 1) * s.expert_ffn * s.expert_hidden // p.etp
    biases = own * (s.up * s.expert_ffn // p.etp + s.expert_hidden) if s.bias else 0
    shared = (s.up + 1) * s.shared_ffn * s.hidden // p.tp
    latent = 2 * s.expert_hidden * s.hidden if s.expert_hidden != s.hidden else 0
    router = s.experts * s.hidden + (s.experts if s.bias else 0) + (s.hidden if s.shared_gate else 0)
    beside = norm * (2 if s.post_norms else 1)
    if s.norms_beside:  # the experts' own, the MLP's own, behind each and behind both; scales of the router
        beside, router = 5 * norm, router + s.hidden + s.experts
    return products + shared + latent, router + biases + beside, products + biases
