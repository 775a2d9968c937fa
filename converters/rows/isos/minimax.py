"""MiniMax-M3: which layers hold experts, and which choose blocks of keys, by what."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, whole

_SPARSE, _FULL = "minimax_m3_sparse", "full_attention"
#: The gated activation that the repository names, and what Transformers writes in its place.
_ACTIVATIONS = ("swigluoai", "silu")
#: Fields, which are Transformers' keys, by those of `sparse_attention_config`, with the class's defaults.
_SIZES = {
    "index_n_heads": ("sparse_num_index_heads", 4),
    "index_head_dim": ("sparse_index_dim", 128),
    "index_block_size": ("sparse_block_size", 128),
    "index_topk_blocks": ("sparse_topk_blocks", 16),
    "index_local_blocks": ("sparse_local_block", 1),
}
#: Keys of `sparse_attention_config` that say how blocks are chosen, and the one way that Transformers has.
_FIXED: Mapping[str, Value] = {"use_sparse_attention": True, "sparse_score_type": "max", "sparse_init_block": 0}
_FREQ, _VALUES = "sparse_attention_freq", "sparse_disable_index_value"
FIELDS = ("moe_layer_freq", "lightning_indexer_layers", *_SIZES)


def layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Flags of `moe_layer_freq` and of `sparse_attention_config`, or kinds of layers as Transformers writes them."""
    if (name := hf.get("hidden_act")) not in (None, *_ACTIVATIONS):
        raise UsageError(f"config: hidden_act is {name!r}; this architecture covers {' and '.join(_ACTIVATIONS)}")
    count, said = layers_of(hf, "num_hidden_layers"), hf.get("sparse_attention_config") or {}
    if not isinstance(said, Mapping):
        raise UsageError(f"config: sparse_attention_config is {said!r}, an object was expected")
    if unknown := sorted(said.keys() - {*_FIXED, _FREQ, _VALUES, *(own for own, _ in _SIZES.values())}):
        raise UsageError(f"config: sparse_attention_config.{unknown[0]} is {said[unknown[0]]!r}; no such key is known")
    for key, one in _FIXED.items():
        if said.get(key, one) != one:
            raise UsageError(f"config: sparse_attention_config.{key} is {said[key]!r}; only {one!r} is covered")
    experts = _flags(hf, count, hf.get("moe_layer_freq"), "mlp_layer_types", {"dense": 0, "sparse": 1}, 1)
    chosen = _flags(hf, count, said.get(_FREQ), "layer_types", {_FULL: 0, _SPARSE: 1}, 0)
    if said.get(_VALUES) not in (None, chosen):
        raise UsageError(f"config: {_VALUES} is {said[_VALUES]!r}; what chooses blocks is covered without values")
    sizes = {field: whole(hf.get(field, said.get(own, default)), field) for field, (own, default) in _SIZES.items()}
    layers: list[Value] = [layer for layer, flag in enumerate(chosen) if flag]
    return {"moe_layer_freq": experts, "lightning_indexer_layers": layers, **sizes}


def _flags(
    hf: Mapping[str, Value], count: int, listed: Value, key: str, kinds: Mapping[str, int], otherwise: int
) -> list[Value]:
    """A flag a layer: as `listed`, or by the names under `key`; UsageError where the two differ."""
    named, both = hf.get(key), []
    if named is not None:
        if not isinstance(named, list) or set(map(str, named)) - kinds.keys():
            raise UsageError(f"config: {key} is {named!r}; layers are {' or '.join(kinds)}")
        both.append([kinds[str(name)] for name in named])
    if listed is not None:
        if not isinstance(listed, list) or any(flag not in (0, 1) for flag in listed):
            raise UsageError(f"config: {listed!r} beside {key}; a list of 0 and 1 was expected")
        both.append([int(bool(flag)) for flag in listed])
    flags: list[Value] = [*(both or [[otherwise] * count])[0]]
    if len(flags) != count or any(other != flags for other in both):
        raise UsageError(f"config: {key} and the flags beside it say {both!r}; {count} layers were expected")
    return flags


def layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    """As the repository says it."""
    experts, chosen = (mcore.get(field) for field in FIELDS[:2])
    if not isinstance(experts, list) or not isinstance(chosen, list):
        raise UsageError(f"moe_layer_freq is {experts!r} and {FIELDS[1]} {chosen!r}; lists were expected")
    flags: list[Value] = [int(layer in chosen) for layer in range(len(experts))]
    sizes = {own: mcore.get(field, default) for field, (own, default) in _SIZES.items()}
    return {
        "hidden_act": _ACTIVATIONS[0],
        "moe_layer_freq": experts,
        "sparse_attention_config": {**_FIXED, **sizes, _FREQ: flags, _VALUES: flags},
    }


def keys_chosen(mcore: Mapping[str, Value]) -> int:
    """How many keys a token attends to at most by what an indexer chooses; 0 where there is no such."""
    if not mcore.get("lightning_indexer_layers"):
        return 0
    return whole(mcore.get("index_topk_blocks"), "blocks") * whole(mcore.get("index_block_size"), "keys in a block")
