"""Which mechanisms of a model the forward leg's prompts come to, and the settings that bring them into reach.

A window of 4096 tokens is invisible to a prompt of 48: on a copy of the config, for both sides, it gets a size that
the prompts are longer than. Likewise a cap of 50 is to scores of 1, and gets one that bends them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from converters.errors import MbxError
from converters.rows.expr import Value
from converters.rows.isos.minimax import keys_chosen
from converters.rows.table import Table
from mbx.models.prompts import Passes
from mbx.proof.gaps import Gap

#: Keys that say behind how many positions a mechanism sets in, and what it is.
_LENGTHS = {
    "sliding_window": "attention windows",
    "attention_chunk_size": "attention in chunks",
    "floor_scale": "attention temperature",
}
#: The key that says how many tokens sparse attention attends to.
_CHOSEN = "index_topk"
#: Keys that say from which size of a value on a mechanism sets in, and what it is.
_SIZES = {
    "swiglu_limit": "clamped activations",
    "clip_qkv": "clipped queries, keys and values",
    "attn_logit_softcapping": "soft caps of attention",
    "final_logit_softcapping": "soft caps of logits",
}
#: By how much such a size is made smaller: values of a model fresh or trained come to it, and most stay below.
_SMALLER = 16
#: Megatron Core's fields of mechanisms that any prompt of several tokens comes to, and what each does unsaid.
_FIELDS: Mapping[str, tuple[str, tuple[Value, ...]]] = {
    "moe_router_enable_expert_bias": ("biases of routers", (False,)),
    "moe_router_topk_scaling_factor": ("scaled routing weights", (1.0,)),
    "moe_shared_expert_gate": ("gates of shared experts", (False,)),
    "softmax_type": ("attention sinks", ("vanilla",)),
    "softmax_scale": ("a scale of attention", ()),
    "attention_output_gate": ("gates of attention", (False,)),
    "qk_layernorm": ("norms of queries and keys", (False,)),
    "qk_l2_norm": ("norms of queries and keys", (False,)),
    "model.qk_layernorm_over_heads": ("norms of queries and keys", (False,)),
    "model.rotary_percent": ("a part of a head that turns", (1.0,)),
    "model.post_layernorms": ("norms behind sublayers", (False,)),
    "model.scale_embeddings": ("scaled embeddings", (False,)),
}
#: Keys of factors, one or a list of them.
_MULTIPLIERS = """embedding_multiplier residual_multiplier attention_multiplier logits_scaling logit_scale
attention_in_multiplier attention_out_multiplier key_multiplier ssm_in_multiplier ssm_out_multiplier ssm_multipliers
mlp_multipliers lm_head_multiplier""".split()


@dataclass(slots=True)
class Reach:
    """Mechanisms `reached` and not (`gaps`), and `changes` of the config, v4 spelling, that reach some of them.

    `otherwise` are settings as they were, of changes that reach something only where the logits would be others with
    them: `settle` takes what the run showed.
    """

    reached: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    changes: dict[str, Value] = field(default_factory=dict)
    otherwise: dict[str, Value] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """What is reached, in one line; empty where the config names no mechanism."""
        return f"reached: {', '.join(self.reached)}" if self.reached else ""

    def changed(self, config: Mapping[str, Value], like: Mapping[str, Value]) -> dict[str, Value]:
        """The changes for a side of `config`, in the ratio of its sizes to those of `like`, which they were made for.

        Two sides of unequal sizes stay unequal.
        """
        out: dict[str, Value] = {}
        for key, value in self.changes.items():
            own, other = config.get(key), like.get(key)
            if isinstance(value, int) and isinstance(own, int) and isinstance(other, int):
                out[key] = max(1, round(value * own / other))
            elif isinstance(value, float) and isinstance(own, int | float) and isinstance(other, int | float):
                out[key] = value * own / other
        return out

    def settle(self, felt: Collection[str]) -> None:
        """Say of each of `otherwise` whether it was reached: whether it is among those that the logits `felt`."""
        for key, size in self.otherwise.items():
            what = f"{_SIZES[key]} of {size}"
            if key in felt:
                self.reached.append(f"{what}, made {self.changes[key]} on both sides")
            else:
                self.gaps.append(Gap("not reached", f"{what}, made {self.changes[key]}: no value comes to that"))


def reach(
    config: Mapping[str, Value],
    fields: Mapping[str, Value],
    read: Passes,
    table: Table | None,
    *,
    heads: int,
    megatron: bool,
    transformers: bool,
    towers: bool = False,
) -> Reach:
    """What of the model of `config` (v4 spelling), in Megatron Core's `fields`, the passes `read` come to.

    `table` makes Megatron Core's config where that side takes part (`megatron`): what it cannot express at another
    size stays as it is. Whether values come to a size shows in Transformers' run alone (`transformers`).
    `heads` counts tensors of prediction layers, which no library's logits depend on; `towers` says that the model
    takes more than text.
    """
    found = Reach()
    longest = max(batch.ids.shape[1] for batch in read.batches)
    if longest < 2:
        found.gaps.append(Gap("not reached", "attention to other tokens: every prompt has one token"))
    for key, what in _LENGTHS.items():
        _length(found, key, what, config, longest, table if megatron else None, megatron)
    if fields.get("experimental_attention_variant") == "dsa":
        size = fields.get("dsa_indexer_topk")
        _choice(found, size, config, longest, table if megatron else None, megatron)
    for key, what in _SIZES.items() if transformers else ():
        _size(found, key, what, config, table if megatron else None, megatron)
    keys, context = keys_chosen(fields), config.get("max_position_embeddings")
    if keys and isinstance(context, int) and longest <= keys < context:
        found.gaps.append(Gap("not reached", f"a choice among more than {keys} keys, which Megatron Core lacks"))
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type") != "dynamic":  # which leaves the context as it is
        kind = f"scaled positions ({scaling.get('rope_type')})"
        if any(bool(batch.far.any()) for batch in read.batches):
            found.reached.append(kind)
        else:
            found.gaps.append(Gap("not reached", f"{kind}: no prompt comes to the original context's end"))
    if longest > 1:
        found.reached += dict.fromkeys(_always(config, fields))
    if any(batch.pictures is not None for batch in read.batches):
        found.reached.append("pictures")
    elif towers:
        found.gaps.append(Gap("not reached", "pictures or sounds: every prompt is text"))
    if heads:
        found.gaps.append(Gap("not reached", f"prediction layers ({heads} tensors), on which no logit depends"))
    return found


def _length(
    found: Reach,
    key: str,
    what: str,
    config: Mapping[str, Value],
    longest: int,
    table: Table | None,
    megatron: bool,
) -> None:
    size, context = config.get(key), config.get("max_position_embeddings")
    if not isinstance(size, int) or isinstance(size, bool) or not _is_on(key, config):
        return
    if isinstance(context, int) and size >= context:
        return  # as long as the context: there is nothing behind it
    if size < longest:
        found.reached.append(f"{what} of {size}")
        return
    smaller = max(2, longest // 3)
    if smaller >= longest or megatron and not _expressed(table, config, key, smaller):
        found.gaps.append(Gap("not reached", f"{what} of {size}, of prompts of {longest} tokens"))
        return
    found.changes[key] = smaller
    found.reached.append(f"{what} of {size}, made {smaller} on both sides")


def _choice(
    found: Reach, size: Value, config: Mapping[str, Value], longest: int, table: Table | None, megatron: bool
) -> None:
    """A choice of `size` tokens, made one less than the longest prompt has where the config says it: what it leaves
    out is the default of each library, which no other config changes.

    Tokens whose scores are so near that rounding exchanges them are then the two least of all, of one position.
    """
    smaller, context = longest - 1, config.get("max_position_embeddings")
    if not isinstance(size, int) or isinstance(size, bool):
        return
    if isinstance(context, int) and size >= context:
        return  # as many as there can be: nothing is chosen
    what = f"a choice of {size} tokens"
    if size < longest:
        found.reached.append(what)
    elif smaller < 1 or config.get(_CHOSEN) != size or megatron and not _expressed(table, config, _CHOSEN, smaller):
        found.gaps.append(Gap("not reached", f"{what}, of prompts of {longest} tokens"))
    else:
        found.changes[_CHOSEN] = smaller
        found.reached.append(f"{what}, made {smaller} on both sides")


def _size(found: Reach, key: str, what: str, config: Mapping[str, Value], table: Table | None, megatron: bool) -> None:
    size = config.get(key)
    if not isinstance(size, int | float) or isinstance(size, bool):
        return
    smaller = float(size) / _SMALLER
    if megatron and not _expressed(table, config, key, smaller):
        found.gaps.append(Gap("not reached", f"{what} of {size}"))
        return
    found.changes[key], found.otherwise[key] = smaller, size


def _is_on(key: str, config: Mapping[str, Value]) -> bool:
    """Whether a model uses the size that `key` states."""
    kinds = config.get("layer_types")
    if key == "sliding_window":
        return config.get("use_sliding_window") is not False and (
            not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
        )
    if key == "attention_chunk_size":
        return not isinstance(kinds, list) or "chunked_attention" in kinds
    return bool(config.get("attn_temperature_tuning", True))


def _expressed(table: Table | None, config: Mapping[str, Value], key: str, size: float) -> bool:
    """Whether Megatron Core's config says another size too."""
    if table is None:
        return False
    try:
        plain = table.config.to_mcore(config, allow_unused=tuple(config))
        return table.config.to_mcore({**config, key: size}, allow_unused=tuple(config)) != plain
    except MbxError:
        return False


def _always(config: Mapping[str, Value], fields: Mapping[str, Value]) -> Iterator[str]:
    """Mechanisms that any prompt of several tokens comes to."""
    if config.get("rope_local_base_freq") is not None:
        yield "a second rotary base"
    if isinstance(config.get("no_rope_layers"), list) or config.get("no_rope_layer_interval"):
        yield "layers without positions"
    if isinstance(kinds := config.get("layer_types"), list) and len(set(map(str, kinds))) > 1:
        yield "a pattern of layers"
    groups, chosen = config.get("n_group"), config.get("topk_group")
    if isinstance(groups, int) and isinstance(chosen, int) and groups > chosen:
        yield "groups of experts"
    stated = [config.get(key) for key in _MULTIPLIERS]
    if any(factor not in (None, 1) for one in stated for factor in (one if isinstance(one, list) else [one])):
        yield "multipliers"
    for name, (what, unsaid) in _FIELDS.items():
        if fields.get(name) not in (None, *unsaid):
            yield what
