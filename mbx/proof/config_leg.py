"""The config leg of parity: the settings of two sides, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.engine.plan import Plan
from converters.errors import MbxError
from converters.mcore.field_equality import alike, listed
from converters.mcore.layout import count_of
from converters.mcore.megatron_args import TRAINING
from converters.rows.config_spelling import GENERIC_KEYS, canonical
from converters.rows.expr import Value
from converters.rows.isos.rope import LLAMA3_FIXED
from mbx.formats.architecture import stated_config
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import config_file
from mbx.proof.comparison import Pair
from mbx.proof.legs import Leg
from mbx.tables import table_for

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


#: Llama 4 scales queries behind `floor_scale` positions unless this says otherwise; no Megatron Core field does.
_TEMPERATURE = "attn_temperature_tuning"


def config(pair: Pair) -> Leg:
    """Settings of both sides, field by field, in Megatron Core's names."""
    left, right = pair.nouns
    if pair.left.spelling == "hf" and pair.right.spelling == "hf":
        return _hf_config(pair)
    sides = []
    for side, noun in ((pair.left, left), (pair.right, right)):
        fields, origin = _fields(side, pair)
        if fields is None:
            article = noun if pair.left.spelling != pair.right.spelling else f"{noun} checkpoint"
            return Leg("config", "not run", f"{article} {origin}")
        sides.append((fields, origin))
    (mine, mine_origin), (other, other_origin) = sides
    names = sorted(set(mine) | set(other))
    summary = f"{len(names)} fields"
    if origin := other_origin or mine_origin:
        names = sorted((set(mine) & set(other)) - TRAINING - _of_absent_layers(pair.plan))
        summary = f"{len(names)} fields, all that {origin} says"
        unequal = [name for name in names if not alike(name, mine, other)]
    else:
        unequal = [name for name in unequal_fields(mine, other) if name not in _of_absent_layers(pair.plan)]
    if not names:
        return Leg("config", "not run", "the two sides state no setting in common")
    findings = _findings(pair, unequal, mine, other)
    if (mine_file := config_file(pair.left)) is not None and (other_file := config_file(pair.right)) is not None:
        findings += _unmapped(pair, canonical(mine_file), canonical(other_file))
    return Leg("config", "failed" if findings else "passed", summary, tuple(findings))


def _fields(side: Checkpoint, pair: Pair) -> tuple[Mapping[str, Value] | None, str]:
    """Fields that a side states, and what states them where that is not a whole config.json; or why there are none.

    A checkpoint's config.json is read by the pair's table only where it names the folder's model type: another type
    may mean something else by the same keys.
    """
    if side.spelling == "hf":
        return pair.plan.config, ""
    if (stored := config_file(side)) is not None:
        config, table = pair.left.config, pair.plan.table
        try:
            if not config or canonical(config).get("model_type") != canonical(stored).get("model_type"):
                table = None
            return (table or table_for(stored)).config.to_mcore(stored), ""
        except MbxError as error:
            return None, f"has a config.json that cannot be read: {error.fact}"
    fields, origin = stated_config(side)
    return (fields, origin) if fields else (None, "carries no config.json (hf/)")


def _findings(
    pair: Pair, names: Iterable[str], mine: Mapping[str, Value], other: Mapping[str, Value], prefix: str = ""
) -> list[str]:
    """A line for each of `names`, whose values differ."""
    left, right = pair.nouns
    return [
        f"`{prefix}{name}`{_meaning(pair.plan, name)}: {mine.get(name)!r} in {left}, {other.get(name)!r} in {right}"
        for name in names
    ]


def _unequal(mine: Mapping[str, Value], other: Mapping[str, Value]) -> list[str]:
    return sorted(name for name in set(mine) | set(other) if mine.get(name) != other.get(name))


def _unmapped(pair: Pair, mine: Mapping[str, Value], other: Mapping[str, Value]) -> list[str]:
    """Differences, in the v4 spelling, of what changes the forward pass and has no Megatron Core field."""
    left, right = _without_field(mine), _without_field(other)
    return _findings(pair, _unequal(left, right), left, right)


def _without_field(config: Mapping[str, Value]) -> dict[str, Value]:
    """The constants of Llama 3's rotary scaling, which Megatron Core fixes, and Llama 4's attention temperature."""
    out: dict[str, Value] = {} if config.get(_TEMPERATURE) in (None, True) else {_TEMPERATURE: config[_TEMPERATURE]}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type") == "llama3":
        out |= {f"rope_scaling.{key}": scaling.get(key) for key in LLAMA3_FIXED}
    return out


def unequal_fields(left: Mapping[str, Value], right: Mapping[str, Value]) -> list[str]:
    """Names of the fields in which two whole configs say different things.

    A number for every n-th layer equals the list it stands for, and a model without experts has no setting of them.
    """
    dense = not _has_experts(left) and not _has_experts(right)
    names = sorted(set(left) | set(right))
    count = count_of(left, "num_layers")
    return [
        name
        for name in names
        if listed(name, left.get(name), count) != listed(name, right.get(name), count)
        and not (dense and name.startswith(("moe_", "num_moe_")))
    ]


def _of_absent_layers(plan: Plan) -> set[str]:
    """Fields about prediction layers that neither side has a tensor of: configs promise them, savers drop them."""
    has_some = any(draft.name.startswith("mtp.") for draft in plan.drafts)
    return set() if has_some else {"mtp_num_layers", "model.mtp_num_layers"}


def _has_experts(config: Mapping[str, Value]) -> bool:
    """Whether some layer has experts; hybrid models say it in their pattern, whatever number of experts they state."""
    pattern = config.get("hybrid_override_pattern", config.get("model.hybrid_override_pattern"))
    return "E" in pattern if isinstance(pattern, str) else bool(config.get("num_moe_experts"))


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
    mine, other = canonical(pair.left.config), canonical(pair.right.config)
    table, known, findings = pair.plan.table, set(GENERIC_KEYS), []
    names: list[str] = []
    if table is not None:
        try:
            fields = [table.config.to_mcore(side, allow_unused=tuple(side)) for side in (mine, other)]
        except MbxError as error:
            return Leg("config", "failed", error.fact, error.details)
        names = sorted(set(fields[0]) | set(fields[1]))
        findings = _findings(pair, unequal_fields(*fields), fields[0], fields[1])
        findings += _unmapped(pair, mine, other)
        known |= table.config.known_keys()
    known.discard("model_type")
    findings += _quantization(pair)
    keys = sorted(key for key in set(mine) | set(other) if key not in known and not key.startswith("_"))
    findings += _findings(pair, (key for key in keys if mine.get(key) != other.get(key)), mine, other)
    summary = f"{len(names)} fields, {len(keys)} other keys" if table is not None else f"{len(keys)} keys"
    return Leg("config", "failed" if findings else "passed", summary, tuple(findings))


def _quantization(pair: Pair) -> list[str]:
    """Differences of `quantization_config` where both folders have the same tensors, and it says how some are decoded.

    Switches that are off say what their absence says.
    """
    left, right = pair.left, pair.right
    if left.tensors.keys() != right.tensors.keys() or not (_decodes(left) or _decodes(right)):
        return []
    mine, other = ({k: v for k, v in (quantization_of(f.config) or {}).items() if v} for f in (left, right))
    return _findings(pair, _unequal(mine, other), mine, other, "quantization_config.")


def _decodes(folder: Checkpoint) -> bool:
    """Whether some tensor is read through a codec, or would be if its settings were readable."""
    try:
        return bool(decoded_view(folder.tensors, quantization_of(folder.config))[1])
    except MbxError:
        return True
