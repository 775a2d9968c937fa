"""MiMo-V2-Flash: which layers are windowed, and how wide their heads are."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, positive, whole
from converters.rows.isos.layers import sliding_layers_to_mcore, window_to_hf

_OF_WINDOWED = {
    "swa_num_attention_heads": "num_attention_heads",
    "swa_head_dim": "head_dim",
    "swa_v_head_dim": "v_head_dim",
}
_WIDTHS = ("num_attention_heads", "kv_channels", "v_head_dim")


def layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """MiMo-V2-Flash: `hybrid_layer_pattern` (1 = windowed) or `layer_types`, else full layers are the first and each
    sixth. The repository's `sliding_window_size` leaves out the token itself, Transformers' `sliding_window` does not.
    """
    for own, others in _OF_WINDOWED.items():
        if hf.get(own) not in (None, hf.get(others)):
            raise UsageError(
                f"config: {own} is {hf[own]!r} and {others} {hf.get(others)!r}; the class has one for both"
            )
    flags, layers = hf.get("hybrid_layer_pattern"), range(layers_of(hf, "num_hidden_layers"))
    if (kinds := hf.get("layer_types")) is not None:
        said = sliding_layers_to_mcore(kinds, hf)
        if flags not in (None, said):
            raise UsageError(f"config: hybrid_layer_pattern is {flags!r} and layer_types is {kinds!r}")
        flags = said
    flags = [int(layer > 0 and (layer + 1) % 6 != 0) for layer in layers] if flags is None else flags
    size, window = hf.get("sliding_window_size"), hf.get("sliding_window", 129)
    left = whole(positive(window, "sliding_window"), "sliding_window") - 1
    left = left if size is None else whole(positive(size, "sliding_window_size"), "sliding_window_size")
    return {"window_size": [left, 0], "window_attn_skip_freq": flags}


def layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    flags = mcore.get("window_attn_skip_freq")
    window = window_to_hf(mcore)["sliding_window"]
    return {
        "hybrid_layer_pattern": flags,
        "sliding_window_size": None if window is None else whole(window, "window_size") - 1,
        **{own: mcore.get(field) for own, field in zip(_OF_WINDOWED, _WIDTHS, strict=True)},
    }
