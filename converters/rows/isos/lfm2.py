"""LFM2: layers of short convolutions among those of attention, and how wide its MLP is."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, positive, whole
from converters.rows.isos.layers import FULL


def short_conv_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """LFM2: `layer_types`, or the layers of `full_attn_idxs`, ↔ a flag a layer, 1 = short convolution."""
    count, kinds, full = layers_of(hf, "num_hidden_layers"), hf.get("layer_types"), hf.get("full_attn_idxs")
    if kinds is None:
        kinds = [FULL if not isinstance(full, list) or layer in full else "conv" for layer in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or set(map(str, kinds)) - {"conv", FULL}:
        raise UsageError(f"config: layer_types is {kinds!r}; layers are conv or {FULL}")
    return {"short_conv_layers": [int(kind == "conv") for kind in kinds], "hetereogenous_dist_checkpoint": True}  # sic


def short_conv_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    flags = mcore.get("short_conv_layers")
    return {"layer_types": ["conv" if flag else FULL for flag in flags] if isinstance(flags, list) else None}


def adjusted_width_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """LFM2's MLP: two thirds of what the config says, times a factor, up to a multiple; or what it says."""
    said = "block_ff_dim" if hf.get("block_ff_dim") is not None else "intermediate_size"
    width = layers_of(hf, said)
    if hf.get("block_auto_adjust_ff_dim", True):
        factor, multiple = hf.get("block_ffn_dim_multiplier", 1.0), hf.get("block_multiple_of", 256)
        width, every = int(2 * width / 3), whole(positive(multiple, "block_multiple_of"), "block_multiple_of")
        width = every * -(-int(positive(factor, "block_ffn_dim_multiplier") * width) // every)
    return {"ffn_hidden_size": width}


def adjusted_width_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"intermediate_size": mcore.get("ffn_hidden_size"), "block_auto_adjust_ff_dim": False}
