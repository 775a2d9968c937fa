"""Which parts stay: layers that are named, or as many of each width as are asked for, the most important ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from converters.errors import UsageError
from converters.pruning.kept import WIDTHS, Kept, Spot, in_ranges
from converters.rows.expr import Value
from converters.rows.pack import Rows

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pruning:
    """What shall be left of a model; None leaves a size as it is.

    `layers` are the numbers of the decoder layers that stay, `keep_layers` how many do, the most important ones.
    The others are sizes, of which the most important parts stay: `hidden` of the residual stream, `ffn` of a dense
    MLP, `expert_ffn` of an expert and `shared_ffn` of all shared experts together, `heads` query heads in `kv_heads`
    groups, `experts` a layer. `kv_heads` stay as many as they are where `heads` is a multiple of them. `drop_mtp`
    leaves multi-token-prediction layers out.
    """

    layers: tuple[int, ...] | None = None
    keep_layers: int | None = None
    hidden: int | None = None
    ffn: int | None = None
    expert_ffn: int | None = None
    shared_ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None
    drop_mtp: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """The widths that are asked for, by Megatron Core's field."""
        said = ((name, getattr(self, choice.replace("-", "_"))) for name, choice in WIDTHS.items())
        return {name: size for name, size in said if size is not None}


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each part of a model matters: the larger, the more.

    `layers`: [layers]. `widths`: scores by Megatron Core's field and by spot, [parts]: of the hidden size in one place
    (no layer), of an expert's channels a layer and expert, of all others a layer.
    """

    layers: Scores | None = None
    widths: Mapping[str, Mapping[Spot, Scores]] = field(default_factory=dict)


def choose(pruning: Pruning, importance: Importance | None, fields: Mapping[str, Value]) -> Kept:
    """What stays of a model of `fields`; UsageError for what is not there, or of whose importance nothing is known."""
    layers = _layers(pruning, importance, _count(fields, "num_layers"))
    sizes = pruning.sizes
    if "num_attention_heads" in sizes or "num_query_groups" in sizes:
        sizes |= _heads(sizes, fields)
    widths = {}
    for name, size in sizes.items():
        count = _count(fields, name)
        if not 0 < size <= count:
            raise UsageError(f"‹{WIDTHS[name]}› {size} cannot be left of {count}")
        if size < count:
            widths[name] = size
    if "num_moe_experts" in widths:
        _check_experts(widths["num_moe_experts"], fields)
    if len(layers) == _count(fields, "num_layers") and not widths and not pruning.drop_mtp:
        raise UsageError("nothing is left out", hint="give ‹layers› A-B,C-D, or ‹keep-layers› or a width with ‹by›")
    return Kept(layers, _chosen(widths, importance, fields), not pruning.drop_mtp)


def _count(fields: Mapping[str, Value], name: str) -> int:
    count = fields.get(name)
    if not isinstance(count, int) or not count:
        raise UsageError(f"this model has no {name}: ‹{WIDTHS.get(name, name)}› cannot be pruned")
    return count


def _layers(pruning: Pruning, importance: Importance | None, count: int) -> tuple[int, ...]:
    if pruning.layers is not None and pruning.keep_layers is not None:
        raise UsageError("‹layers› names the layers that stay, ‹keep-layers› how many do: give one of them")
    if pruning.layers is not None:
        if not pruning.layers or sorted(set(pruning.layers)) != list(pruning.layers):
            raise UsageError(f"‹layers› {in_ranges(pruning.layers)}: ascending numbers of layers were expected")
        if pruning.layers[0] < 0 or pruning.layers[-1] >= count:
            raise UsageError(f"‹layers› {in_ranges(pruning.layers)}: the model's are 0-{count - 1}")
        return pruning.layers
    if pruning.keep_layers is None:
        return tuple(range(count))
    if not 0 < pruning.keep_layers <= count:
        raise UsageError(f"‹keep-layers› {pruning.keep_layers} cannot be left of {count}")
    scores = None if importance is None else importance.layers
    if scores is None:
        raise UsageError("‹keep-layers› needs the importance of layers", hint=_MEASURE)
    if len(scores) != count:
        raise UsageError(f"‹by› tells the importance of {len(scores)} layers; the model has {count}")
    return tuple(map(int, _best(scores, pruning.keep_layers)))


_MEASURE = "measure it: `mbx importance SRC data.jsonl -o importance.json`, then ‹by› importance.json"


def _heads(sizes: Mapping[str, int], fields: Mapping[str, Value]) -> dict[str, int]:
    """Both counts of heads; UsageError where no whole number of query heads would share a key head."""
    heads, groups = (_count(fields, name) for name in ("num_attention_heads", "num_query_groups"))
    left = sizes.get("num_attention_heads", heads)
    usual = left if groups == heads else groups
    left_groups = sizes.get("num_query_groups", usual)
    if left_groups < 1 or left % left_groups:
        raise UsageError(
            f"{left} query heads cannot share {left_groups} key heads evenly",
            hint=f"the model has {heads} in {groups}: ‹heads› has to be a multiple of ‹kv-heads›",
        )
    if left // left_groups > heads // groups:
        raise UsageError(f"{left} query heads in {left_groups} groups: the model's have {heads // groups} each")
    return {"num_attention_heads": left, "num_query_groups": left_groups}


def _chosen(
    sizes: Mapping[str, int], importance: Importance | None, fields: Mapping[str, Value]
) -> dict[str, dict[Spot, Rows]]:
    chosen: dict[str, dict[Spot, Rows]] = {}
    for name, size in sizes.items():
        if name not in ("num_attention_heads", "num_query_groups"):
            parts = _parts_of_router(fields) if name == "num_moe_experts" else 1
            scores = _scores(name, importance, fields)
            chosen[name] = {spot: _best_of_each(own, size, parts) for spot, own in scores.items()}
    if sizes.keys() & {"num_attention_heads", "num_query_groups"}:
        heads, groups = (_count(fields, name) for name in ("num_attention_heads", "num_query_groups"))
        left, left_groups = sizes.get("num_attention_heads", heads), sizes.get("num_query_groups", groups)
        for spot, own in _scores("num_attention_heads", importance, fields).items():
            stay, shared = best_heads(own, groups, left_groups, left)
            if left < heads:
                chosen.setdefault("num_attention_heads", {})[spot] = stay
            if left_groups < groups:
                chosen.setdefault("num_query_groups", {})[spot] = shared
    return chosen


def _check_experts(left: int, fields: Mapping[str, Value]) -> None:
    topk, groups, chosen = (fields.get(f"moe_router_{name}") for name in ("topk", "num_groups", "group_topk"))
    parts, within = _parts_of_router(fields), left
    if left % parts:
        raise UsageError(f"‹experts› {left} is no multiple of the {groups} groups that the router ranks")
    if parts > 1 and isinstance(chosen, int):
        within = left // parts * chosen
    if 1 < parts == left and fields.get("moe_router_score_function") == "sigmoid":
        raise UsageError(f"‹experts› {left}: one in each of {parts} groups, which the router ranks by their best two")
    if isinstance(topk, int) and topk > within:
        raise UsageError(f"‹experts› {left}: a token is sent to {topk}, and could be to {within}")


def _parts_of_router(fields: Mapping[str, Value]) -> int:
    """Groups of experts that a router ranks: as many stay in each."""
    groups = fields.get("moe_router_num_groups")
    return groups if isinstance(groups, int) and groups > 1 else 1


def _scores(name: str, importance: Importance | None, fields: Mapping[str, Value]) -> Mapping[Spot, Scores]:
    scores = None if importance is None else importance.widths.get(name)
    if not scores:
        raise UsageError(f"‹{WIDTHS[name]}› needs the importance of its parts", hint=_MEASURE)
    count = _count(fields, name)
    for (layer, _), own in scores.items():
        if len(own) != count:
            raise UsageError(
                f"‹by› tells the importance of {len(own)} parts of ‹{WIDTHS[name]}›"
                + ("" if layer is None else f" at layer {layer}")
                + f"; the model has {count}"
            )
    return scores


def best_heads(scores: Scores, groups: int, left_groups: int, left: int) -> tuple[Rows, Rows]:
    """Query heads and groups that stay: the best groups by the sum of their heads, and in each as many, the best."""
    by_group = scores.reshape(groups, -1)
    shared = _best(by_group.sum(axis=1), left_groups)
    width = by_group.shape[1]
    stay = [_best(by_group[group], left // left_groups) + group * width for group in shared]
    return np.concatenate(stay), shared


def _best_of_each(scores: Scores, size: int, parts: int) -> Rows:
    """As many of each of `parts` equal stretches, `size` in all."""
    width = len(scores) // parts
    stretches = scores.reshape(parts, width)
    return np.concatenate([_best(own, size // parts) + number * width for number, own in enumerate(stretches)])


def _best(scores: Scores, count: int) -> Rows:
    """The numbers of the largest scores, ascending; of equals the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
