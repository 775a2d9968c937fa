"""The fields of a pruned model, and the keys of config.json that say them."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import MbxError, UnsupportedError, UsageError
from converters.pruning.kept import WIDTHS, Kept
from converters.rows.config_map import ConfigRow, environment
from converters.rows.expr import Value
from converters.rows.isos import FIELDS, VALUE
from converters.rows.table import Table

Fields = Mapping[str, Value]

#: Fields of a flag a layer, or of a period N: (layer + 1) % N == 0 has the first flag, others the second.
_PERIODS = {
    "moe_layer_freq": (1, 0),
    "window_attn_skip_freq": (0, 1),
    "linear_attention_freq": (0, 1),
    "no_rope_freq": (1, 0),
}
#: Fields of one entry a layer, however they are spelled.
_BY_LAYER = ("block_configs", "model.hybrid_override_pattern")
#: Keys of config.json with an entry a layer; those that number layers; those that count the first ones of a kind.
_LISTS = frozenset(
    """layer_types mlp_layer_types no_rope_layers is_moe_layer block_configs indexer_types attn_type_list
    layers_block_type hybrid_override_pattern index_topk_pattern""".split()
)
_NUMBERS = frozenset(("mlp_only_layers", "moe_layers"))
_FIRST = frozenset(("first_k_dense_replace", "first_last_k_dense_replace", "max_window_layers"))
#: Fields of multi-token-prediction layers, as they are where there are none.
_AHEAD: Fields = {
    "mtp_num_layers": None,
    "model.mtp_num_layers": None,
    "model.mtp_hybrid_override_pattern": None,
    "model.mtp_block_layers": 0,
}
#: Types of models whose config class in Transformers (5.14) takes no hidden size that its heads do not divide.
_EVEN = frozenset("llama deepseek_v2 gemma2 gemma3_text internlm3".split())
#: Other keys by which folders say a field.
_ALSO = {
    "num_moe_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_ffn_hidden_size": ("moe_intermediate_size", "expert_hidden_dim"),
}


def pruned_fields(table: Table, fields: Fields, kept: Kept) -> dict[str, Value]:
    """Megatron Core fields of what `kept` leaves of a model of `fields`; UnsupportedError where no model has such."""
    out = dict(fields)
    layers = fields["num_layers"]
    assert isinstance(layers, int)
    if len(kept.layers) < layers:
        if (fields.get("dsa_indexer_topk_freq") or 1) != 1:
            raise UnsupportedError("layers of this model take the tokens that one before chose: none can be left out")
        out |= {"num_layers": len(kept.layers)} | _by_layer(fields, kept.layers)
    for width in kept.widths:
        out |= {field: kept.size(width) for field in (width, *twins_of(table, width))}
    if not kept.ahead:
        out |= {field: nothing for field, nothing in _AHEAD.items() if fields.get(field)}
    if kept.widths:
        _check_widths(table, fields, out, kept)
    return out


def _by_layer(fields: Fields, layers: tuple[int, ...]) -> dict[str, Value]:
    """Fields that say each layer's kind, of the layers that stay; periods are spelt out: they may not stay such."""
    out: dict[str, Value] = {}
    for field in (*_PERIODS, *_BY_LAYER):
        value = _spelt_out(field, fields.get(field), fields)
        if isinstance(value, str):
            out[field] = "".join(value[layer] for layer in layers)
        elif isinstance(value, list):
            out[field] = [value[layer] for layer in layers]
    return out


def _spelt_out(field: str, value: Value, fields: Fields) -> Value:
    """A flag a layer, where a field of flags says a period."""
    layers = fields["num_layers"]
    if field not in _PERIODS or not isinstance(value, int) or isinstance(value, bool) or not isinstance(layers, int):
        return value
    there, elsewhere = _PERIODS[field]
    return [elsewhere if (layer + 1) % value else there for layer in range(layers)]


def twins_of(table: Table, width: str) -> list[str]:
    """Other prunable fields that config.json says by the same key: they cannot differ."""
    keys = {row.hf for row in table.config.rows if row.mcore == width and row.via is None}
    said = [row.mcore for row in table.config.rows if row.hf in keys and row.via is None]
    return [field for field in said if field in WIDTHS and field != width]


def _check_widths(table: Table, before: Fields, after: Fields, kept: Kept) -> None:
    if kept.widths.keys() & {"hidden_size"} and environment(before).get("scale_embeddings"):
        raise UnsupportedError(
            "this model scales its embeddings by its own width: another ‹hidden› would change all of them",
            hint="prune ‹ffn›, ‹heads› or layers of it",
        )
    if kept.widths.keys() & {"num_attention_heads", "num_query_groups"} and environment(before).get(
        "qk_layernorm_over_heads"
    ):
        raise UnsupportedError(
            "this model takes the norm of its queries and keys over all heads: without some, the others' would change"
        )
    of_windows = {key: value for key, value in before.items() if key.startswith("windowed_") and value is not None}
    apart = any(value != before.get(key.removeprefix("windowed_")) for key, value in of_windows.items())
    if before.get("heterogeneous_block_specs") or apart:
        raise UnsupportedError("layers of this model have widths of their own: only whole layers are pruned")
    env, narrow = environment(before), environment(after)
    sizes, others = table.dims_at(env), table.dims_at(narrow)
    for name, size in sizes.items():
        if table.dims[name] not in WIDTHS and others.get(name) != size:
            raise UnsupportedError(
                f"`{name}` is `{table.dims[name]}` in the table `{table.name}`, and no key of config.json "
                f"keeps it at {size}: {_choices(kept)} would make it {others.get(name)}",
            )


def _choices(kept: Kept) -> str:
    return ", ".join(f"‹{WIDTHS[width]}›" for width in kept.widths)


def pruned_keys(table: Table, hf: Fields, before: Fields, after: Fields, kept: Kept) -> dict[str, Value]:
    """Keys of a config.json `hf` that change for `after` to be what the table reads in it, and their values.

    `before` is what it reads now. UnsupportedError names the fields that no key can say.
    """
    _check_even(hf, after)
    changes = {} if len(kept.layers) == before["num_layers"] else _of_layers(hf, kept.layers, before)
    for row in table.config.rows:
        if (row.mcore in WIDTHS or row.mcore == "num_layers") and before.get(row.mcore) != after.get(row.mcore):
            for key in (row.hf, *_ALSO.get(row.mcore, ())):
                if key == row.hf or key in hf:
                    changes[key] = _key_of(row, after)
    if "num_hidden_layers" in hf:
        changes["num_hidden_layers"] = after["num_layers"]
    for attempt in (False, True):
        if not (wrong := _unequal(_read(table, {**hf, **changes}), after)):
            return {key: value for key, value in changes.items() if hf.get(key) != value or key not in hf}
        if not attempt:
            changes |= _said(table, wrong, after)
    raise UnsupportedError(
        f"config.json of `{table.name}` has no way to say what would be left of " + ", ".join(f"`{w}`" for w in wrong),
        details=[f"{field} = {after.get(field)!r}" for field in wrong],
    )


def _check_even(hf: Fields, after: Fields) -> None:
    hidden, heads = after.get("hidden_size"), after.get("num_attention_heads")
    if hf.get("model_type") in _EVEN and isinstance(hidden, int) and isinstance(heads, int) and hidden % heads:
        raise UsageError(
            f"Transformers loads no {hf['model_type']} model of ‹hidden› {hidden} and ‹heads› {heads}",
            hint="one has to be a multiple of the other, whatever width a head has",
        )


def _read(table: Table, hf: Fields) -> Fields:
    try:
        return table.config.to_mcore(hf, allow_unused=tuple(hf))
    except MbxError as error:
        raise UnsupportedError(f"what would be left is no model of `{table.name}`: {error.fact}") from error


def _unequal(found: Fields, wanted: Fields) -> list[str]:
    return [
        field
        for field in dict.fromkeys((*found, *wanted))
        if _spelt_out(field, found.get(field), wanted) != _spelt_out(field, wanted.get(field), wanted)
    ]


def _said(table: Table, fields: list[str], wanted: Fields) -> dict[str, Value]:
    """Keys that say some fields, by the table's own rows and conversions."""
    out: dict[str, Value] = {}
    for row in table.config.rows:
        if row.mcore in fields:
            out[row.hf] = _key_of(row, wanted)
    for group in table.config.groups:
        if set(FIELDS[group].mcore) & set(fields):
            out |= FIELDS[group].to_hf(wanted)
    return out


def _key_of(row: ConfigRow, wanted: Fields) -> Value:
    value = wanted.get(row.mcore)
    return value if row.via is None else VALUE[row.via].to_hf(value, wanted)


def _of_layers(hf: Fields, layers: tuple[int, ...], before: Fields) -> dict[str, Value]:
    """Keys that speak of single layers, of those that stay; what they say of layers behind the decoder's stays too."""
    count = before["num_layers"]
    assert isinstance(count, int)
    out: dict[str, Value] = {}
    for key, value in hf.items():
        if key in _LISTS and isinstance(value, list | str) and len(value) >= count:
            chosen = [value[layer] for layer in layers]
            out[key] = "".join(map(str, chosen)) + value[count:] if isinstance(value, str) else chosen + value[count:]
        elif key in _NUMBERS and isinstance(value, list):
            out[key] = [layers.index(layer) for layer in value if layer in layers]
        elif key in _FIRST and isinstance(value, int):
            out[key] = sum(layer < value for layer in layers)
    return out
