"""Which layers do what: windows, rotary or none, linear attention, hybrid patterns."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, positive, whole

_WINDOWED, FULL = "sliding_attention", "full_attention"


def window_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Sliding window of W tokens, the current one included ↔ mcore's (W-1 to the left, 0 to the right)."""
    width = hf.get("sliding_window")
    if hf.get("use_sliding_window") is False:
        width = None
    if width is None:
        return {"window_size": None}
    positive(width, "sliding_window")
    return {"window_size": [whole(width, "sliding_window") - 1, 0]}


def window_to_hf(mcore: Mapping[str, Value]) -> Fields:
    window = mcore.get("window_size")
    return {"sliding_window": None if not isinstance(window, list) else whole(window[0], "window_size") + 1}


def sliding_layers_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """`layer_types` ↔ mcore's flag per layer, 1 = windowed; without it every `sliding_window_pattern`-th is full."""
    if value is None:
        return hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    kinds = {_WINDOWED: 1, FULL: 0}
    if not isinstance(value, list) or any(kind not in kinds for kind in value):
        raise UsageError(f"config: layer_types is {value!r}; only {' and '.join(kinds)} are known here")
    return [kinds[str(kind)] for kind in value]


def sliding_layers_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    if isinstance(value, int) and not isinstance(value, bool):
        layers = whole(mcore.get("num_layers"), "num_layers")
        value = [int((layer + 1) % value != 0) for layer in range(layers)]
    if not isinstance(value, list):
        return None
    return [_WINDOWED if windowed else FULL for windowed in value]


def unrotated_full_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """EXAONE 4: a model with a window rotates its windowed layers alone, one without rotates all."""
    window = window_to_mcore({"sliding_window": 4096, **hf})
    if window["window_size"] is None:
        if (kinds := hf.get("layer_types")) is not None and (not isinstance(kinds, list) or set(kinds) != {FULL}):
            raise UsageError(f"config: layer_types is {kinds!r}, and sliding_window is null")
        return {**window, "window_attn_skip_freq": None, "no_rope_freq": None}
    windowed = sliding_layers_to_mcore(hf.get("layer_types") or _by_pattern(hf), hf)
    return {**window, "window_attn_skip_freq": windowed, "no_rope_freq": flipped(windowed)}


def _by_pattern(hf: Mapping[str, Value]) -> list[Value]:
    """`layer_types` where every `sliding_window_pattern`-th layer is full; "LLLG" says the same as 4."""
    pattern, layers = hf.get("sliding_window_pattern", 4), layers_of(hf, "num_hidden_layers")
    if isinstance(pattern, str) and set(pattern[:-1]) == {"L"} and pattern[-1] == "G":
        pattern = len(pattern)
    every = whole(positive(pattern, "sliding_window_pattern"), "sliding_window_pattern")
    return [_WINDOWED if (layer + 1) % every else FULL for layer in range(layers)]


def unrotated_full_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    windowed, window = mcore.get("window_attn_skip_freq"), window_to_hf(mcore)
    if window["sliding_window"] is None:
        return {**window, "layer_types": [FULL] * layers_of(mcore, "num_layers")}
    if not isinstance(windowed, list) or mcore.get("no_rope_freq") != flipped(windowed):
        raise UsageError("no_rope_freq and window_attn_skip_freq differ; unrotated layers are those without a window")
    return {**window, "layer_types": sliding_layers_to_hf(windowed, mcore)}


def full_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """No layer has a window, in any spelling of a class that windows layers from `max_window_layers` on."""
    kinds, first = hf.get("layer_types"), hf.get("max_window_layers")
    if kinds is None and hf.get("sliding_window") is not None and first is not None:
        kinds = [_WINDOWED] if whole(first, "max_window_layers") < layers_of(hf, "num_hidden_layers") else None
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) != {FULL}):
        raise UsageError(
            f"config: sliding_window is {hf.get('sliding_window')!r} from layer {first!r} on, layer_types is "
            f"{hf.get('layer_types')!r}; this architecture is covered without windows"
        )
    return {}


def full_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"sliding_window": None, "layer_types": [FULL] * layers_of(mcore, "num_layers")}


def ssm_width_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """A mixer is as wide as its heads together, if a width is said at all."""
    heads, each, said = (hf.get(f"mamba_{key}") for key in ("n_heads", "d_head", "d_ssm"))
    wide = None if heads is None or each is None else whole(heads, "mamba_n_heads") * whole(each, "mamba_d_head")
    if None not in (said, wide) and said != wide:
        raise UsageError(f"config: mamba_d_ssm is {said!r}, and {heads!r} heads of {each!r} are {wide!r}")
    return {}


def ssm_width_to_hf(mcore: Mapping[str, Value]) -> Fields:
    heads, each = mcore.get("mamba_num_heads"), mcore.get("mamba_head_dim")
    if heads is None or each is None:
        return {}
    return {"mamba_d_ssm": whole(heads, "mamba_num_heads") * whole(each, "mamba_head_dim")}


def no_rope_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """`no_rope_layers` (1 = rotated) ↔ mcore's flag per layer, 1 = not rotated; without it every fourth is not.

    An empty list is none at all (`Llama4TextConfig.__post_init__`).
    """
    if not value:
        every = whole(hf.get("no_rope_layer_interval", 4), "no_rope_layer_interval")
        layers = whole(hf.get("num_hidden_layers"), "num_hidden_layers")
        value = [int((layer + 1) % every != 0) for layer in range(layers)]
    return flipped(value)


def flipped(value: Value) -> Value:
    if not isinstance(value, list) or any(flag not in (0, 1) for flag in value):
        raise UsageError(f"config: no_rope_layers is {value!r}, a list of 0 and 1 was expected")
    return [1 - whole(flag, "no_rope_layers") for flag in value]


def linear_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`layer_types` or `full_attention_interval` ↔ mcore's linear_attention_freq N: each N-th layer is full."""
    kinds, every = hf.get("layer_types"), hf.get("full_attention_interval")
    if kinds is not None:
        if not isinstance(kinds, list) or "full_attention" not in kinds:
            raise UsageError(f"config: layer_types is {kinds!r}; a full_attention layer was expected")
        period = kinds.index("full_attention") + 1
        if kinds != linear_layers(period, len(kinds)) or every not in (None, period):
            raise UsageError("config: layer_types does not repeat with one full_attention layer in each period")
        every = period
    return {"linear_attention_freq": whole(every, "full_attention_interval")}


def linear_layers(period: int, count: int) -> list[Value]:
    return ["linear_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]


def linear_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    freq = mcore.get("linear_attention_freq")
    if isinstance(freq, list):  # a flag a layer, 1 = linear
        if 0 not in freq or freq != [int((n + 1) % (freq.index(0) + 1) != 0) for n in range(len(freq))]:
            raise UsageError(
                f"linear_attention_freq is {freq!r}; one full-attention layer in each period was expected"
            )
        mcore = {**mcore, "linear_attention_freq": freq.index(0) + 1}
    period = layers_of(mcore, "linear_attention_freq")
    return {"full_attention_interval": period, "layer_types": linear_layers(period, layers_of(mcore, "num_layers"))}


_HYBRID_KINDS = {
    **dict.fromkeys(("linear_attention", "mamba"), "M"),
    **dict.fromkeys(("full_attention", "attention"), "*"),
    "mlp": "-",
    "moe": "E",
}


def hybrid_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`hybrid_override_pattern`, or `layers_block_type` as v5 writes it, ↔ the pattern and its length."""
    pattern, kinds = hf.get("hybrid_override_pattern"), hf.get("layers_block_type")
    if pattern is None:
        if not isinstance(kinds, list) or any(kind not in _HYBRID_KINDS for kind in kinds):
            raise UsageError(f"config: layers_block_type is {kinds!r}; kinds are {', '.join(_HYBRID_KINDS)}")
        pattern = "".join(_HYBRID_KINDS[str(kind)] for kind in kinds)
    if not isinstance(pattern, str) or set(pattern) - {*_HYBRID_KINDS.values()}:
        raise UsageError(f"config: hybrid_override_pattern is {pattern!r}; layers are M, *, - and E")
    if hf.get("num_hidden_layers") not in (None, len(pattern)):
        raise UsageError(f"config: num_hidden_layers is {hf['num_hidden_layers']}, the pattern has {len(pattern)}")
    return {"num_layers": len(pattern), "model.hybrid_override_pattern": pattern}


def hybrid_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {
        "num_hidden_layers": mcore.get("num_layers"),
        "hybrid_override_pattern": mcore.get("model.hybrid_override_pattern"),
    }


_SPARSE = ("deepseek_sparse_attention", "indexed_attention")


def indexed_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Layers with an indexer of their own, the others taking the last one's choice, ↔ a period and where it begins.

    `indexer_types` says each layer, `index_topk_pattern` by letters; without either every layer before
    `index_skip_topk_offset` and every `index_topk_freq`-th from the one before it on has one (GLM-5.2).
    """
    count, pattern = layers_of(hf, "num_hidden_layers"), hf.get("index_topk_pattern")
    if (kinds := hf.get("layer_types")) is not None and (not isinstance(kinds, list) or set(kinds) - set(_SPARSE)):
        raise UsageError(f"config: layer_types is {kinds!r}; only {' and '.join(_SPARSE)} are known here")
    said = hf.get("indexer_types")
    if said is None and isinstance(pattern, str):
        said = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    if said is None:
        freq, offset = hf.get("index_topk_freq"), hf.get("index_skip_topk_offset")
        every = 1 if freq is None else max(1, whole(freq, "index_topk_freq"))
        begin = 2 if offset is None else max(1, whole(offset, "index_skip_topk_offset"))
        said = _indexers(count, every, begin)
    spellings = ((every, begin) for every in range(1, count + 1) for begin in range(1, count + 1))
    found = next((pair for pair in spellings if _indexers(count, *pair) == said), None)
    if found is None:
        raise UsageError(f"config: indexer_types is {said!r}; Megatron Core has one period of layers with an indexer")
    every, begin = found
    return {"dsa_indexer_topk_freq": every, "dsa_indexer_skip_topk_offset": 0 if every == 1 else begin}


def _indexers(count: int, every: int, begin: int) -> list[Value]:
    return ["shared" if max(layer + 1 - begin, 0) % every else "full" for layer in range(count)]


def indexed_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    every = whole(mcore.get("dsa_indexer_topk_freq") or 1, "dsa_indexer_topk_freq")
    begin = max(1, whole(mcore.get("dsa_indexer_skip_topk_offset") or 0, "dsa_indexer_skip_topk_offset"))
    return {"indexer_types": _indexers(layers_of(mcore, "num_layers"), every, begin)}


def no_linear_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """MiniMax's `attn_type_list`: 1 is softmax attention, the only kind Megatron Core has here."""
    if value is not None and (not isinstance(value, list) or set(value) != {1}):
        raise UsageError(f"config: attn_type_list is {value!r}; only softmax attention (1) is covered")
    return None


def hybrid_mtp_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Layers of a hybrid model's prediction block: `mtp_hybrid_override_pattern`, or `mtp_layers_block_type` of v5.

    One block is known here: of several, the layers' numbers in the checkpoint would run through all.
    """
    count = hf.get("num_nextn_predict_layers") or 0
    if count == 0:
        return {"model.mtp_num_layers": None, "model.mtp_hybrid_override_pattern": None, "model.mtp_block_layers": 0}
    pattern, kinds = hf.get("mtp_hybrid_override_pattern"), hf.get("mtp_layers_block_type")
    if pattern is None and isinstance(kinds, list):
        pattern = "".join(_HYBRID_KINDS.get(str(kind), "?") for kind in kinds)
    if count != 1 or not isinstance(pattern, str) or not pattern or set(pattern) - {"*", "-", "E"}:
        raise UsageError(
            f"config: num_nextn_predict_layers is {count!r} of layers {pattern!r}; "
            "one block of attention, MLP and expert layers was expected"
        )
    return {
        "model.mtp_num_layers": 1,
        "model.mtp_hybrid_override_pattern": pattern,
        "model.mtp_block_layers": len(pattern),
    }


def hybrid_mtp_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if not mcore.get("model.mtp_num_layers"):
        return {"num_nextn_predict_layers": 0}
    return {
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": mcore.get("model.mtp_hybrid_override_pattern"),
    }
