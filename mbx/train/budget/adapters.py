"""Adapters of a layer as sizes: what both the count of parameters and the budget of activations are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from mbx.train.budget.shape import Shape


@dataclass(frozen=True, slots=True)
class Pairs:
    """Adapters on one linear of a rank: `atoms` pairs, A [r, inputs] each and B's of `outputs` rows together.

    `row_parallel`: the output is a sum over ranks. `experts` have such adapters each, of which a token meets `topk`.
    """

    atoms: int
    inputs: int
    outputs: int
    row_parallel: bool = False
    experts: int = 1
    topk: int = 1

    def parameters(self, rank: int, dora: bool) -> int:
        """Elements of A, B and DoRA's magnitudes on this rank."""
        return self.experts * (rank * (self.atoms * self.inputs + self.outputs) + (self.outputs if dora else 0))


def pairs_of(recipe: Recipe, s: Shape, *, dense: bool) -> tuple[Pairs, ...]:
    """The adapters of one layer on a rank, of a `dense` layer or of one with experts; none without `lora.rank`."""
    if not recipe.lora.rank:
        return ()
    tp, ep = recipe.parallel.tp, recipe.parallel.ep
    # A is whole and B cut under a column-parallel base, the other way round under a row-parallel one; projections to
    # the latents are whole.
    found: dict[str, list[Pairs]] = {}
    if m := s.latent:
        up = s.heads * (m.head + m.value) // tp
        found["linear_q_proj"] = [Pairs(1, s.hidden, s.q // tp)]
        found["linear_q_down_proj"] = [Pairs(1, s.hidden, m.q)]
        found["linear_q_up_proj"] = [Pairs(1, m.q, s.q // tp)]
        found["linear_kv_down_proj"] = [Pairs(1, s.hidden, m.kv + m.rotary)]
        found["linear_kv_up_proj"] = [Pairs(1, m.kv, up)]
    else:
        found["linear_qkv"] = [Pairs(3, s.hidden, (s.q + 2 * s.kv) // tp)]
    found["linear_proj"] = [Pairs(1, (s.heads * m.value if m else s.q) // tp, s.hidden, row_parallel=True)]

    def mlp(ffn: int) -> tuple[Pairs, Pairs]:
        return Pairs(s.up, s.hidden, s.up * ffn // tp), Pairs(1, ffn // tp, s.hidden, row_parallel=True)

    mlps: list[tuple[Pairs, Pairs]] = []
    if dense:
        mlps.append(mlp(s.ffn))
    else:
        # Transformers holds gate and up of all experts in one tensor, on which PEFT puts one pair. Experts that have
        # adapters are not cut (`mbx.train.lora.attach.check_lora`).
        own, ffn = s.experts // ep, s.expert_ffn
        first = Pairs(1, s.hidden, s.up * ffn, experts=own, topk=s.topk)
        mlps.append((first, Pairs(1, ffn, s.hidden, True, experts=own, topk=s.topk)))
        if s.shared_ffn:
            mlps.append(mlp(s.shared_ffn))
    found["linear_fc1"], found["linear_fc2"] = [one[0] for one in mlps], [one[1] for one in mlps]
    return tuple(one for target in recipe.lora.targets for one in found.get(target, ()))
