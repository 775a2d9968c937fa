"""The config leg of parity: the settings of two sides, field by field."""

from __future__ import annotations

from collections.abc import Mapping

from converters.dialects.megatron_args import NEUTRAL, TRAINING
from converters.errors import MbxError
from converters.expr import Value
from converters.plan import Plan
from converters.spelling import GENERIC_KEYS, canonical
from mbx.io import hf
from mbx.io.architecture import stated_config
from mbx.registry import table_for
from mbx.verify.legs import Leg
from mbx.verify.pairs import Pair
from mbx.verify.sides import Side

#: What a field means to the forward pass, for a reader who does not know Megatron Core's names.
MEANINGS = {
    "num_layers": "decoder layers",
    "hidden_size": "width of the residual stream",
    "ffn_hidden_size": "width of the MLP",
    "num_attention_heads": "query heads",
    "num_query_groups": "key and value heads",
    "kv_channels": "size of one head",
    "layernorm_epsilon": "added to the variance in every norm",
    "num_moe_experts": "routed experts",
    "moe_router_topk": "experts a token goes to",
    "moe_ffn_hidden_size": "width of one expert",
    "moe_router_topk_scaling_factor": "factor on the routing weights",
    "moe_router_score_function": "how router logits become scores",
    "add_qkv_bias": "bias of query, key and value",
    "qk_layernorm": "norms of queries and keys",
    "window_size": "how far attention looks back",
    "gated_linear_unit": "whether the MLP has a gate",
    "layernorm_zero_centered_gamma": "norm weights are stored minus 1",
    "mtp_num_layers": "multi-token-prediction heads",
    "model.vocab_size": "tokens of the vocabulary",
    "model.rotary_base": "base of the rotary frequencies",
    "model.rotary_percent": "share of a head that turns",
    "model.rope_scaling": "whether rotary frequencies are scaled",
    "model.rope_scaling_factor": "how far rotary frequencies are stretched",
    "model.max_sequence_length": "positions of the context",
    "model.share_embeddings_and_output_weights": "whether the output layer is the embedding",
}


def config(pair: Pair) -> Leg:
    """Settings of both sides, field by field, in Megatron Core's names."""
    left, right = pair.nouns
    if pair.left.kind == "hf" and pair.right.kind == "hf":
        return _hf_config(pair)
    sides = []
    for side, noun in ((pair.left, left), (pair.right, right)):
        fields, origin = _fields(side, pair.plan)
        if fields is None:
            article = noun if pair.left.kind != pair.right.kind else f"{noun} checkpoint"
            return Leg("config", "not run", f"{article} {origin}")
        sides.append((fields, origin))
    (mine, mine_origin), (other, other_origin) = sides
    names = sorted(set(mine) | set(other))
    summary = f"{len(names)} fields"
    if origin := other_origin or mine_origin:
        names = sorted((set(mine) & set(other)) - TRAINING - _of_absent_layers(pair.plan))
        summary = f"{len(names)} fields, all that {origin} says"
        count = _layers(mine)
        unequal = [n for n in names if not _alike(n, _listed(n, mine[n], count), _listed(n, other[n], count))]
    else:
        unequal = [name for name in unequal_fields(mine, other) if name not in _of_absent_layers(pair.plan)]
    if not names:
        return Leg("config", "not run", "the two sides state no setting in common")
    findings = [
        f"`{name}`{_meaning(pair.plan, name)}: {mine.get(name)!r} in {left}, {other.get(name)!r} in {right}"
        for name in unequal
    ]
    return Leg("config", "failed" if findings else "passed", summary, tuple(findings))


def _fields(side: Side, plan: Plan) -> tuple[Mapping[str, Value] | None, str]:
    """Fields that a side states, and what states them where that is not a whole config.json; or why there are none."""
    if side.folder is not None:
        return plan.config, ""
    assert side.checkpoint is not None
    checkpoint, table = side.checkpoint, plan.table
    if checkpoint.hf is not None and (checkpoint.hf / hf.CONFIG).is_file():
        stored = hf.read_config(checkpoint.hf)
        try:
            return (table or table_for(stored)).config.to_mcore(stored), ""
        except MbxError as error:
            return None, f"has a config.json that cannot be read: {error.fact}"
    fields, origin = stated_config(checkpoint)
    return (fields, origin) if fields else (None, "carries no config.json (hf/)")


#: Fields that say "every n-th layer" by one number, and whether such a layer is marked 1: the others are then 0.
_PATTERNS = {"moe_layer_freq": True, "window_attn_skip_freq": False, "linear_attention_freq": False}


def unequal_fields(left: Mapping[str, Value], right: Mapping[str, Value]) -> list[str]:
    """Names of the fields in which two whole configs say different things.

    A number for every n-th layer equals the list it stands for, and a model without experts has no setting of them.
    """
    dense = not _has_experts(left) and not _has_experts(right)
    names = sorted(set(left) | set(right))
    count = _layers(left)
    return [
        name
        for name in names
        if _listed(name, left.get(name), count) != _listed(name, right.get(name), count)
        and not (dense and name.startswith(("moe_", "num_moe_")))
    ]


def _layers(config: Mapping[str, Value]) -> int:
    layers = config.get("num_layers")
    return layers if isinstance(layers, int) else 0


def _of_absent_layers(plan: Plan) -> set[str]:
    """Fields about prediction layers that neither side has a tensor of: configs promise them, savers drop them."""
    has_some = any(draft.name.startswith("mtp.") for draft in plan.drafts)
    return set() if has_some else {"mtp_num_layers", "model.mtp_num_layers"}


def _has_experts(config: Mapping[str, Value]) -> bool:
    """Whether some layer has experts; hybrid models say it in their pattern, whatever number of experts they state."""
    pattern = config.get("hybrid_override_pattern", config.get("model.hybrid_override_pattern"))
    return "E" in pattern if isinstance(pattern, str) else bool(config.get("num_moe_experts"))


def _listed(name: str, value: Value, layers: int) -> Value:
    """The pattern of a field as a list of `layers` numbers (Megatron Core: moe_layer_freq, window_attn_skip_freq)."""
    if name not in _PATTERNS or isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return value
    if _PATTERNS[name]:
        return [int(layer % value == 0) for layer in range(layers)]
    return [int((layer + 1) % value != 0) for layer in range(layers)]


def _alike(name: str, left: Value, right: Value) -> bool:
    neutral = (*NEUTRAL.get(name, ()), None)
    return left == right or (not left and not right) or (left in neutral and right in neutral)


def _meaning(plan: Plan, name: str) -> str:
    parts = [MEANINGS[name]] if name in MEANINGS else []
    if plan.table is not None:
        parts += [f"`{row.hf}` in config.json" for row in plan.table.config.rows if row.mcore == name]
    return f" ({', '.join(parts)})" if parts else ""


def _hf_config(pair: Pair) -> Leg:
    """Two config.json files, either Transformers spelling.

    With a table, what counts is what they mean to it, and every key that it does not know; without one, every key but
    those that no model reads.
    """
    assert pair.left.folder is not None and pair.right.folder is not None
    left, right = pair.nouns
    mine, other = canonical(pair.left.folder.config), canonical(pair.right.folder.config)
    table, known, findings = pair.plan.table, set(GENERIC_KEYS), []
    names: list[str] = []
    if table is not None:
        try:
            fields = [table.config.to_mcore(side, allow_unused=tuple(side)) for side in (mine, other)]
        except MbxError as error:
            return Leg("config", "failed", error.fact, error.details)
        names = sorted(set(fields[0]) | set(fields[1]))
        findings = [
            f"`{name}`{_meaning(pair.plan, name)}: {fields[0].get(name)!r} in {left}, "
            f"{fields[1].get(name)!r} in {right}"
            for name in unequal_fields(*fields)
        ]
        known |= table.config.known_keys()
    known.discard("model_type")
    keys = sorted(key for key in set(mine) | set(other) if key not in known and not key.startswith("_"))
    findings += [
        f"`{key}`: {mine.get(key)!r} in {left}, {other.get(key)!r} in {right}"
        for key in keys
        if mine.get(key) != other.get(key)
    ]
    summary = f"{len(names)} fields, {len(keys)} other keys" if table is not None else f"{len(keys)} keys"
    return Leg("config", "failed" if findings else "passed", summary, tuple(findings))
