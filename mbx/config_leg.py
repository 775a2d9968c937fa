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
from mbx.legs import Leg
from mbx.pairs import Pair
from mbx.registry import table_for
from mbx.sides import Side

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
        names = sorted((set(mine) & set(other)) - TRAINING)
        summary = f"{len(names)} fields, all that {origin} says"
        unequal = [name for name in names if not _alike(name, mine[name], other[name])]
    else:
        unequal = [name for name in names if mine.get(name) != other.get(name)]
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


def _alike(name: str, left: Value, right: Value) -> bool:
    neutral = (*NEUTRAL.get(name, ()), None)
    return left == right or (not left and not right) or (left in neutral and right in neutral)


def _meaning(plan: Plan, name: str) -> str:
    parts = [MEANINGS[name]] if name in MEANINGS else []
    if plan.table is not None:
        parts += [f"`{row.hf}` in config.json" for row in plan.table.config.rows if row.mcore == name]
    return f" ({', '.join(parts)})" if parts else ""


def _hf_config(pair: Pair) -> Leg:
    """Two config.json files, either Transformers spelling; keys without effect on the forward pass do not count."""
    assert pair.left.folder is not None and pair.right.folder is not None
    left, right = pair.nouns
    ignored = GENERIC_KEYS | (pair.plan.table.config.ignore if pair.plan.table else frozenset())
    sides = [canonical(side.folder.config) for side in (pair.left, pair.right) if side.folder is not None]
    names = sorted({k for side in sides for k in side if k not in ignored and not k.startswith("_")} | {"model_type"})
    findings = [
        f"`{name}`: {sides[0].get(name)!r} in {left}, {sides[1].get(name)!r} in {right}"
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]
    if pair.plan.table is not None and findings:  # a key that is absent may stand for what it is by default
        mine, other = (pair.plan.table.config.to_mcore(side, allow_unused=side) for side in sides)
        if mine == other:
            findings = [line for line in findings if "None in" not in line]
    return Leg("config", "failed" if findings else "passed", f"{len(names)} keys", tuple(findings))
