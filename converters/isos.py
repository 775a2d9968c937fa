"""Registered conversions between Hugging Face config values and Megatron Core ones, both ways.

`VALUE` pairs translate one key; `FIELDS` translate a group of keys into a group of fields. Law of each:
`to_hf(to_mcore(x)) == x` for every x that `to_mcore` accepts; what it does not accept is a UsageError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.errors import UsageError
from converters.expr import Value

Fields = dict[str, Value]


@dataclass(frozen=True, slots=True)
class ValueIso:
    """One Hugging Face value ↔ one Megatron Core value; the second argument is the whole config of that side."""

    to_mcore: Callable[[Value, Mapping[str, Value]], Value]
    to_hf: Callable[[Value, Mapping[str, Value]], Value]


@dataclass(frozen=True, slots=True)
class FieldsIso:
    """A group of Hugging Face keys ↔ a group of Megatron Core fields (`mcore` names them)."""

    mcore: tuple[str, ...]
    to_mcore: Callable[[Mapping[str, Value]], Fields]
    to_hf: Callable[[Mapping[str, Value]], Fields]


def number(value: Value, what: str) -> float:
    """`value` as a number; UsageError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"config: {what} is {value!r}, a number was expected")
    return value


# --- rotary scaling --------------------------------------------------------------------------------------------

#: What megatron.core.models.common.embeddings.rotary_pos_embedding hard-codes for Llama 3 scaling.
LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Llama 3 or linear scaling."""
    scaling = hf.get("rope_scaling")
    off: Fields = {"model.rope_scaling": False, "model.rope_scaling_factor": 8.0, "model.seq_len_interpolation_factor": None}
    if scaling is None:
        return off
    if not isinstance(scaling, Mapping):
        raise UsageError(f"config: rope_scaling is {scaling!r}, an object was expected")
    kind = scaling.get("rope_type")
    if kind == "linear":
        return {**off, "model.seq_len_interpolation_factor": scaling.get("factor")}
    if kind != "llama3":
        raise UsageError(
            f"config: rope_scaling of type {kind!r} has no Megatron Core counterpart in this architecture",
            hint="supported here: llama3, linear",
        )
    return {**off, "model.rope_scaling": True, "model.rope_scaling_factor": scaling.get("factor")}


def _rope_to_hf(mcore: Mapping[str, Value]) -> Fields:
    if mcore.get("model.rope_scaling"):
        return {
            "rope_scaling": {"rope_type": "llama3", "factor": mcore.get("model.rope_scaling_factor"), **LLAMA3_FIXED}
        }
    if (factor := mcore.get("model.seq_len_interpolation_factor")) is not None:
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    return {"rope_scaling": None}


def inexpressible_rope(hf: Mapping[str, Value]) -> list[str]:
    """Rotary constants of `hf` that Megatron Core fixes at another value, one line each.

    Weights convert all the same; a forward pass in Megatron Core would differ.
    """
    scaling = hf.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") != "llama3":
        return []
    return [
        f"rope_scaling.{key} is {scaling.get(key)}; Megatron Core fixes {fixed:g}"
        for key, fixed in LLAMA3_FIXED.items()
        if scaling.get(key) != fixed
    ]


# --- attention windows and layer patterns ------------------------------------------------------------------------


def _window_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Sliding window of W tokens, the current one included ↔ mcore's (W-1 to the left, 0 to the right)."""
    width = hf.get("sliding_window")
    if hf.get("use_sliding_window") is False:
        width = None
    return {"window_size": None if width is None else [int(number(width, "sliding_window")) - 1, 0]}


def _window_to_hf(mcore: Mapping[str, Value]) -> Fields:
    window = mcore.get("window_size")
    return {"sliding_window": None if not isinstance(window, list) else int(number(window[0], "window_size")) + 1}


FIELDS: dict[str, FieldsIso] = {
    "rope": FieldsIso(
        ("model.rope_scaling", "model.rope_scaling_factor", "model.seq_len_interpolation_factor"),
        _rope_to_mcore,
        _rope_to_hf,
    ),
    "window": FieldsIso(("window_size",), _window_to_mcore, _window_to_hf),
}

VALUE: dict[str, ValueIso] = {
    "not": ValueIso(lambda v, _: not v, lambda v, _: not v),
    "rsqrt": ValueIso(
        lambda v, _: 1.0 / math.sqrt(number(v, "scale")), lambda v, _: round(1.0 / number(v, "softmax_scale") ** 2, 6)
    ),
    "zero_is_none": ValueIso(lambda v, _: v or None, lambda v, _: v or 0),
}
