"""The config leg of parity: the settings of two sides, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.engine.plan import Plan
from converters.errors import MbxError
from converters.mcore.bridge_config import config_of_run_config
from converters.mcore.field_equality import alike, is_idle, listed
from converters.mcore.hybrid_form import hybrid_config
from converters.mcore.keys import parse_key
from converters.mcore.layout import count_of
from converters.mcore.megatron_args import TRAINING, config_of_args
from converters.rows.config_spelling import GENERIC_KEYS, canonical, model_type_of
from converters.rows.expr import Value
from converters.rows.isos.rope import LLAMA3_FIXED
from mbx.formats.architecture import stated_config, table_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.fitting import unequal_fields as unequal_shared
from mbx.formats.hf import config_file
from mbx.models.transformers.defaults import completed_pair, unequal_keys
from mbx.proof.comparison import Pair
from mbx.proof.gaps import Gap
from mbx.proof.legs import Leg
from mbx.proof.side_files import compare_side_files

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


#: Keys that tables ignore and that change no pass: of training, of caches and kernels, or read by no code.
_IDLE = frozenset(
    """pretraining_tp output_router_logits router_jitter_noise router_aux_loss_coef seq_aux ep_size for_llm_compressor
    use_mamba_kernels num_logits_to_keep rescale_prenorm_residual mamba_ssm_cache_dtype moe_shared_expert_overlap
    mtp_loss_scaling_factor keep_mtp_spec_in_bf16 full_attn_mod interpolate_factor initial_context_length
    experts_per_token sliding_window_size""".split()
)
#: Keys that are read under `use_sliding_window` alone, where a config has that switch.
_WINDOWED = frozenset(("sliding_window", "max_window_layers"))
#: Llama 4 scales queries behind `floor_scale` positions unless this says otherwise; no Megatron Core field does.
_TEMPERATURE = "attn_temperature_tuning"


def config(pair: Pair) -> tuple[Leg, tuple[Gap, ...]]:
    """Settings of both sides, and what lies beside their weights; also what one side alone has.

    Three statements of a Megatron checkpoint are held against each other: hf/config.json, run_config.yaml and args.
    """
    both_hf = pair.left.spelling == pair.right.spelling == "hf"
    leg = _hf_config(pair) if both_hf else _by_field(pair)
    try:
        beside = compare_side_files(pair.left, pair.right, pair.nouns)
        findings = [*_without_effect(pair), *_sidecars(pair), *beside.findings]
    except MbxError as error:
        return replace(leg, status="failed", details=(*leg.details, error.fact, *error.details)), ()
    found = dict.fromkeys((*leg.details, *findings))
    return (replace(leg, status="failed", details=tuple(found)) if findings else leg), tuple(beside.gaps)


def _by_field(pair: Pair) -> Leg:
    """Settings of two sides of which at least one is Megatron Core's, field by field, in its names."""
    left, right = pair.nouns
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


def _without_effect(pair: Pair) -> list[str]:
    """Keys that the table ignores, since Megatron Core has no use of them, and by which the sides are two models.

    Behind the lengths that both can run, beside the text model, or in a layer's kind they may change the pass.
    """
    mine, other = config_file(pair.left), config_file(pair.right)
    if pair.plan.table is None or mine is None or other is None:
        return []
    left, right = canonical(dict(mine)), canonical(dict(other))
    ignored = pair.plan.table.config.ignore - _IDLE - {_TEMPERATURE}
    if not (left.get("use_sliding_window", True) or right.get("use_sliding_window", True)):
        ignored -= _WINDOWED
    read = completed_pair(mine, other)
    names = [key for key in unequal_keys(*read) if key in ignored]
    return [line for name in names for line in _nested(pair, name, read[0].get(name), read[1].get(name))]


def _nested(pair: Pair, name: str, mine: Value, other: Value) -> Iterator[str]:
    """A line for each key of two objects that says different things; of a plain value, one."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in sorted(set(mine) | set(other)):
            if mine.get(key) != other.get(key):
                yield from _nested(pair, f"{name}.{key}", mine.get(key), other.get(key))
        return
    left, right = pair.nouns
    yield f"`{name}`: {mine!r} in {left}, {other!r} in {right}"


def _sidecars(pair: Pair) -> list[str]:
    """Fields by which run_config.yaml or args of a Megatron checkpoint say another model than its config.json."""
    findings = []
    for side, noun in zip((pair.left, pair.right), pair.nouns, strict=True):
        if side.spelling != "mcore" or config_file(side) is None:
            continue
        fields, _ = _fields(side, pair)
        if fields is None:
            continue
        stated = []
        if side.run_config:  # which speaks of the class that is stored; args were read as the GPTModel's
            is_other = side.model_class == "hybrid" and fields.get("model.mcore_model", "gpt") == "gpt"
            own = hybrid_config(fields) if is_other else fields
            stated.append((own, config_of_run_config(side.run_config), "run_config.yaml"))
        if side.args:
            stated.append((fields, config_of_args(side.args), "args"))
        absent = _of_absent_layers(pair.plan)
        for own, said, origin in stated:
            names = [name for name in (*unequal_shared(own, said), *_more(own, said)) if name not in absent]
            findings += [
                f"`{name}`{_meaning(pair.plan, name)}: {own.get(name)!r} by config.json of {noun}, "
                f"{said[name]!r} by its {origin}"
                for name in names
                if not (name == "mtp_num_layers" and not own.get(name))  # what the checkpoint holds counts
            ]
    return findings


def _more(own: Mapping[str, Value], said: Mapping[str, Value]) -> list[str]:
    """Mechanisms that a sidecar states and config.json gives the model no setting of."""
    names = said.keys() - own.keys() - TRAINING
    return sorted(name for name in names if not is_idle(name, said[name]))


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
            if not config or model_type_of(canonical(config)) != model_type_of(canonical(stored)):
                table = None
            return (table or table_of(side, stored)).config.to_mcore(stored), ""
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
    has_some = any(parse_key(draft.name).site == "mtp" for draft in plan.drafts)
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
    read = completed_pair(pair.left.config, pair.right.config)
    apart = [key for key in unequal_keys(*read) if key not in known]
    findings += [line for key in apart for line in _nested(pair, key, read[0].get(key), read[1].get(key))]
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
