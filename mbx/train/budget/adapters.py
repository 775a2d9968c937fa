"""Adapters of a layer as sizes: what both the count of parameters and the budget of activations are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from converters.mcore.keys import HEAD
from mbx.train.budget.layers import Heads, Layer
from mbx.train.budget.shape import Shape
from mbx.train.model.adapted import Linear, adapted, plain
from mbx.train.model.blueprint import Blueprint
from mbx.train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class Pairs:
    """Adapters on one linear of a rank: by part the rank r and the outputs, A [r, inputs] and B [outputs, r].

    `leaf`: the linear's name. `row_parallel`: the output is a sum over ranks. `experts` have such adapters each, of
    which a token meets `topk`.
    """

    leaf: str
    inputs: int
    parts: tuple[tuple[int, int], ...]
    row_parallel: bool = False
    experts: int = 1
    topk: int = 1

    @property
    def ranks(self) -> int:
        """Columns between A's and B's."""
        return sum(rank for rank, _ in self.parts)

    @property
    def outputs(self) -> int:
        """Rows that are adapted."""
        return sum(outputs for _, outputs in self.parts)

    def parameters(self, dora: bool) -> int:
        """Elements of A, B and DoRA's magnitudes on this rank."""
        pairs = sum(rank * (self.inputs + outputs) for rank, outputs in self.parts)
        return self.experts * (pairs + (self.outputs if dora else 0))


@dataclass(frozen=True, slots=True)
class Sizes:
    """A linear of a layer on a rank: its name, columns, rows by atom, and what `Pairs` says of it."""

    module: str
    inputs: int
    atoms: tuple[int, ...]
    row_parallel: bool = False
    experts: int = 1
    topk: int = 1


def chosen(recipe: Recipe, plan: Blueprint) -> Mapping[str, Linear]:
    """The adapted linears of the whole model; empty without adapters, and where no table names the model's parts."""
    return adapted(recipe.lora, plan) if recipe.lora.rank else {}


def pairs_of(
    recipe: Recipe, plan: Blueprint, s: Shape, layer: Layer, known: Mapping[str, Linear]
) -> tuple[Pairs, ...]:
    """The adapters of one layer on a rank, `known` being those of the model; none without `lora.rank`."""
    if not recipe.lora.rank or layer.index < 0:  # prediction layers take none
        return ()
    found = []
    for sizes in sizes_of(recipe, s, layer):
        module = f"decoder.layers.{layer.index}.{sizes.module}"
        weight = f"{module}.weight" + ("0" if ".experts." in module else "")
        linear = known.get(weight) if plan.table else plain(module, recipe.lora, plan)
        if linear is None:
            continue
        parts = tuple((part.rank, sum(sizes.atoms[atom] for atom in part.atoms)) for part in linear.parts)
        leaf = sizes.module.rpartition(".")[2]
        found.append(Pairs(leaf, sizes.inputs, parts, sizes.row_parallel, sizes.experts, sizes.topk))
    return tuple(found)


def pairs_of_output(recipe: Recipe, plan: Blueprint, s: Shape, known: Mapping[str, Linear]) -> Pairs | None:
    """The adapter of the output layer on a rank of the last stage, None where it has none."""
    linear = known.get(HEAD) if plan.table else plain(HEAD.removesuffix(".weight"), recipe.lora, plan)
    if not recipe.lora.rank or linear is None:
        return None
    (part,) = linear.parts
    return Pairs("output_layer", s.hidden, ((part.rank, plan.padded_vocab // recipe.parallel.tp),))


def sizes_of(recipe: Recipe, s: Shape, layer: Layer) -> Iterator[Sizes]:
    """Linears of a layer. A is whole and B cut under a column-parallel one, the other way round under a row-parallel
    one; projections to the latents are whole."""
    tp, ep, etp = recipe.parallel.tp, recipe.parallel.ep, recipe.parallel.etp
    if layer.mixer == "delta" and (d := s.delta):
        atoms = (d.key, d.key, d.value, d.value, d.heads, d.heads)
        yield Sizes("self_attention.in_proj", s.hidden, tuple(atom // tp for atom in atoms))
        yield Sizes("self_attention.out_proj", d.value // tp, (s.hidden,), row_parallel=True)
    elif layer.mixer == "mamba" and (m := s.mamba):
        state = m.groups * m.state
        parts = (m.inner, m.inner, state, state, m.heads)
        yield Sizes("mixer.in_proj", s.hidden, tuple(atom // tp for atom in parts))
        yield Sizes("mixer.out_proj", m.inner // tp, (s.hidden,), row_parallel=True)
    elif layer.mixer:
        yield from _attention(s, layer.heads, tp)

    def mlp(module: str, width: int, ffn: int, cut: int, experts: int = 1, topk: int = 1) -> Iterator[Sizes]:
        yield Sizes(f"{module}.linear_fc1", width, (ffn // cut,) * s.up, experts=experts, topk=topk)
        yield Sizes(f"{module}.linear_fc2", ffn // cut, (width,), True, experts, topk)

    if layer.mlp == "dense":
        yield from mlp("mlp", s.hidden, layer.ffn, tp)
    elif layer.mlp:
        yield Sizes("mlp.router", s.hidden, (s.experts,))
        yield from mlp("mlp.experts", s.expert_hidden, s.expert_ffn, etp, s.experts // ep, s.topk)
        if s.shared_ffn:
            yield from mlp("mlp.shared_experts", s.hidden, s.shared_ffn, tp)


def _attention(s: Shape, h: Heads, tp: int) -> Iterator[Sizes]:
    if m := s.latent:
        up = h.count * (m.head + m.value) // tp
        if m.q:
            yield Sizes("self_attention.linear_q_down_proj", s.hidden, (m.q,))
            yield Sizes("self_attention.linear_q_up_proj", m.q, (h.q // tp,))
        else:
            yield Sizes("self_attention.linear_q_proj", s.hidden, (h.q // tp,))
        yield Sizes("self_attention.linear_kv_down_proj", s.hidden, (m.kv + m.rotary,))
        yield Sizes("self_attention.linear_kv_up_proj", m.kv, (up,))
    else:
        queries = (h.q // tp,) * (2 if s.output_gate else 1)
        own = () if h.shares else (h.k // tp, h.v // tp)
        yield Sizes("self_attention.linear_qkv", s.hidden, (*queries, *own))
    yield Sizes("self_attention.linear_proj", h.out // tp, (s.hidden,), row_parallel=True)
