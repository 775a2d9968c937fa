"""Sizes of a GPT decoder and the parameters a rank holds of it, counted as Megatron Core builds them."""

from __future__ import annotations

from dataclasses import dataclass

from mbx.train.budget.adapters import pairs_of
from mbx.train.budget.shape import Shape, shape_of
from mbx.train.model.blueprint import Blueprint
from mbx.train.recipe.sections import Recipe


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
