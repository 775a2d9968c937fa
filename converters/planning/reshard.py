"""Plans Megatron Core → Megatron Core: the same tensors under another layout, values untouched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from converters.engine.plan import Draft, Plan, Unit, as_it_is
from converters.engine.regions import matrix
from converters.errors import LayoutError
from converters.mcore.cuts import cuts_of, form_of, is_vocab
from converters.mcore.keys import inner_prefix, parse_key
from converters.mcore.layout import Layout, RankMap
from converters.mcore.layout import check as check_layout
from converters.mcore.optimizer_state import is_state, weight_of
from converters.mcore.releases import CURRENT
from converters.mcore.torch_dist import extra_states_of, states_of_model
from converters.planning.placing import place_boxes
from converters.rows.expr import Value
from converters.tensors import Shape, StoredTensor


def plan_reshard(
    sources: Mapping[str, StoredTensor],
    config: Mapping[str, Value],
    layout: Layout,
    *,
    padded_vocab: int | None = None,
    objects: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Plan:
    """Plan that lays `sources` (torch_dist keys) out under `layout`.

    An optimizer's states may be among them: each is cut as its weight, which must be there too.
    `config` holds what is known of the model; what it lacks is not checked beforehand. `padded_vocab` are the
    embedding's rows in the target, as many as in the source if not given: more are zero, fewer cut off.
    `objects` are the source's `_extra_state` objects; those that Transformer Engine would ask for are added, of the
    text model where that lies inside another.
    Raises LayoutError where the layout does not fit, UnsupportedError where it is not known how a tensor is cut.
    """
    check_layout(layout, config)
    shapes = {key: tensor.shape for key, tensor in sources.items() if not is_state(key)}
    cuts = cuts_of(shapes, cut=layout.tp > 1 or layout.expert_tp > 1)
    ranks = RankMap(layout, with_counts(config, shapes))
    kind = CURRENT.kind_of(sources)
    prefix = next(filter(None, map(inner_prefix, sources)), "")
    whole = f"{prefix}embedding.word_embeddings.weight" in sources
    drafts, states = [], [*objects, *(states_of_model(kind, prefix=prefix) if whole else ())]
    units: list[Unit] = []
    for key, tensor in sources.items():
        weight = weight_of(key)
        depth = parse_key(weight).depth
        stack, inner = tensor.shape[:depth], _inner(weight, tensor.shape[depth:], padded_vocab)
        form = form_of(cuts[weight], inner[0] if inner else 1)
        placed = place_boxes(weight, inner, stack, form, layout, ranks)
        drafts.append(Draft(key, tensor.dtype, (*stack, *inner), placed))
        kept = min(matrix(tensor.shape, depth)[0], matrix(inner, 0)[0])
        units += as_it_is(key, key, stack, kept)
        if weight == key and inner_prefix(key) == prefix:
            for index in product(*map(range, stack)):
                states += extra_states_of(key, index, stack, kind)
    plan = Plan.of_all("reshard", config, dict(sources), drafts, units, layout=layout)
    return replace(plan, objects=tuple(dict.fromkeys(states)), notes=notes)


def _inner(key: str, shape: Shape, padded_vocab: int | None) -> Shape:
    if not is_vocab(key) or padded_vocab is None:
        return shape
    return (padded_vocab, *shape[1:])


def with_counts(config: Mapping[str, Value], shapes: Mapping[str, Shape]) -> dict[str, Value]:
    """`config`, with layers and experts counted in the tensors where it does not say them.

    LayoutError where it says otherwise.
    """
    layers: set[int] = set()
    heads: set[int] = set()
    experts: int | None = None
    for key, shape in shapes.items():
        parsed = parse_key(key)
        if parsed.site == "tower":
            continue
        if parsed.stacked:
            layers.update(range(shape[0]))
        elif parsed.layer is not None:
            (layers if parsed.site == "decoder" else heads).add(parsed.layer)
        if parsed.experts:
            experts = shape[parsed.depth - 1]
    out = dict(config)
    for field, counted in (
        ("num_layers", len(layers)),
        ("mtp_num_layers", len(heads) or None),
        ("num_moe_experts", experts),
    ):
        stated = out.get(field)
        if field == "num_layers" and config.get("heterogeneous_block_specs") and layers:
            counted = max(1 + max(layers), stated if isinstance(stated, int) else 0)  # layers may hold no parameters
        if stated is not None and counted is not None and stated != counted:
            raise LayoutError(f"the checkpoint holds {field} = {counted}, its config says {stated}")
        out[field] = stated if counted is None else counted
    return out
