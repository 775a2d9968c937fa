"""Sizes of a GPT decoder and the parameters a rank holds of it, counted as Megatron Core builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.train.lora.sizes import pairs_of
from mbx.train.model import Blueprint, as_int
from mbx.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Latent:
    """Widths of multi-head latent attention: of the latents (`q` 0: queries have none), and of a head."""

    q: int
    kv: int
    head: int
    rotary: int
    value: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a GPT decoder, read from a flat config."""

    hidden: int
    layers: int
    heads: int
    groups: int
    head: int
    ffn: int
    gated: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    dropout: bool
    norm_terms: int
    experts: int
    expert_ffn: int
    topk: int
    shared_ffn: int
    dense_layers: tuple[bool, ...]
    tied: bool
    positions: int
    post_norms: bool
    sinks: bool
    latent: Latent | None

    @property
    def q(self) -> int:
        """Columns of the query."""
        return self.heads * self.head

    @property
    def kv(self) -> int:
        """Columns of the key, and of the value."""
        return self.groups * self.head

    @property
    def up(self) -> int:
        """Outputs of the MLP's first product, in multiples of its width."""
        return 2 if self.gated else 1


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of one rank. `linears` are the decoder's products (what FP8 copies); `adapters` are LoRA's.

    `experts`: those that belong to experts, which are shared out over other ranks than the rest; part of the others.
    """

    embedding: int
    output: int
    linears: int
    others: int
    adapters: int
    experts: int = 0

    @property
    def base(self) -> int:
        """Everything but adapters."""
        return self.embedding + self.output + self.linears + self.others


def shape_of(config: Mapping[str, Value]) -> Shape:
    """Read the sizes; UnsupportedError for models that are counted otherwise."""
    if config.get("experimental_attention_variant"):
        raise UnsupportedError("the budget covers standard and latent attention, this model has another")
    if config.get("model.mcore_model") == "hybrid":
        raise UnsupportedError("the budget does not cover hybrid (Mamba) models")
    heads, hidden = as_int(config, "num_attention_heads"), as_int(config, "hidden_size")
    layers = as_int(config, "num_layers")

    def number(key: str, otherwise: int) -> int:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else otherwise

    latent = None
    if config.get("multi_latent_attention"):
        widths = (number(k, d) for k, d in (("qk_head_dim", 128), ("qk_pos_emb_head_dim", 64), ("v_head_dim", 128)))
        latent = Latent(number("q_lora_rank", 0), number("kv_lora_rank", 512), *widths)
    ffn, experts = number("ffn_hidden_size", 4 * hidden), number("num_moe_experts", 0)
    frequency = config.get("moe_layer_freq", 1)
    if not experts:
        dense = (True,) * layers
    elif isinstance(frequency, list | tuple):
        dense = tuple(not flag for flag in frequency)
    else:
        dense = tuple(layer % int(str(frequency)) != 0 for layer in range(layers))
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        groups=heads if latent else number("num_query_groups", heads),
        head=latent.head + latent.rotary if latent else number("kv_channels", hidden // heads),
        ffn=ffn,
        gated=bool(config.get("gated_linear_unit")),
        bias=bool(config.get("add_bias_linear", True)),
        qkv_bias=bool(config.get("add_qkv_bias")) or bool(config.get("add_bias_linear", True)),
        qk_norm=bool(config.get("qk_layernorm")),
        dropout=bool(config.get("hidden_dropout")),
        norm_terms=1 if config.get("normalization") == "RMSNorm" else 2,
        experts=experts,
        expert_ffn=number("moe_ffn_hidden_size", ffn),
        topk=number("moe_router_topk", 2),
        shared_ffn=number("moe_shared_expert_intermediate_size", 0),
        dense_layers=dense,
        tied=bool(config.get("model.share_embeddings_and_output_weights")),
        positions=as_int(config, "model.max_sequence_length")
        if config.get("model.position_embedding_type") == "learned_absolute"
        else 0,
        post_norms=bool(config.get("model.post_layernorms")),
        sinks=config.get("softmax_type") == "learnable",
        latent=latent,
    )


def _attention(s: Shape, tp: int) -> tuple[int, int]:
    """Products and other parameters of one layer's attention on a rank."""
    if s.latent is None:
        rows = s.q + 2 * s.kv
        others = (2 * s.norm_terms * s.head if s.qk_norm else 0) + (rows // tp if s.qkv_bias else 0)
        others += (s.hidden if s.bias else 0) + (s.heads // tp if s.sinks else 0)
        return (rows + s.q) * s.hidden // tp, others
    m = s.latent
    queries = s.heads * (m.head + m.rotary)
    linears = m.q * s.hidden + queries * m.q // tp if m.q else queries * s.hidden // tp
    linears += (m.kv + m.rotary) * s.hidden  # projections to the latents are whole on every rank
    linears += s.heads * (m.head + m.value) * m.kv // tp + s.heads * m.value * s.hidden // tp
    return linears, s.norm_terms * (m.q + m.kv) if s.qk_norm else 0


def count(recipe: Recipe, plan: Blueprint, stage: int) -> Counts:
    """Parameters that a rank of pipeline `stage` holds, exactly as Megatron Core builds them."""
    s, p = shape_of(plan.config), recipe.parallel
    first, last = stage == 0, stage == p.pp - 1
    per_stage = s.layers // p.pp
    mine = s.dense_layers[stage * per_stage : (stage + 1) * per_stage]
    rows = plan.padded_vocab // p.tp * s.hidden
    embedding = (rows + s.positions * s.hidden) if first else 0
    output = rows if last and (not s.tied or p.pp > 1) else 0
    attention, beside = _attention(s, p.tp)

    def mlp(ffn: int, tp: int) -> int:
        return (s.up + 1) * ffn * s.hidden // tp

    linears = others = experts = 0
    for dense in mine:
        linears += attention
        others += (4 if s.post_norms else 2) * s.norm_terms * s.hidden + beside
        if dense:
            linears += mlp(s.ffn, p.tp)
            others += (s.up * s.ffn // p.tp + s.hidden) if s.bias else 0
        else:
            own = s.experts // p.ep
            products = own * mlp(s.expert_ffn, p.etp)
            biases = own * (s.up * s.expert_ffn // p.etp + s.hidden) if s.bias else 0
            linears += products + (mlp(s.shared_ffn, p.tp) if s.shared_ffn else 0)
            others += s.experts * s.hidden + biases + (s.experts if s.bias else 0)  # the router has a bias as well
            experts += products + biases
    others += s.norm_terms * s.hidden if last else 0
    lora = recipe.lora
    of = {
        dense: sum(p.parameters(lora.rank, lora.dora) for p in pairs_of(recipe, s, dense=dense)) for dense in set(mine)
    }
    return Counts(embedding, output, linears, others, sum(of[dense] for dense in mine), experts)
