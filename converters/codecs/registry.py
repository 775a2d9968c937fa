"""The codecs by name, and which of them a checkpoint's `quantization_config` calls for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from converters.codecs.base import Codec
from converters.codecs.fp8 import Fp8Block, Fp8Scaled
from converters.codecs.int4 import Int4Packed
from converters.codecs.mxfp4 import Mxfp4
from converters.errors import UnsupportedError, UsageError
from converters.rows.expr import Value

#: Each codec with the settings most checkpoints use.
CODECS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in (Fp8Block(), Mxfp4(), Int4Packed(), Fp8Scaled())}
)

_HINT = "dequantise the checkpoint to bf16 first; codecs: " + ", ".join(CODECS)


def quantization_of(config: Mapping[str, Value]) -> Mapping[str, Value] | None:
    """`quantization_config` of a config.json, None where it has none; UsageError where it is not an object."""
    found = config.get("quantization_config")
    if found is None or isinstance(found, Mapping):
        return found
    raise UsageError(
        f"`quantization_config` in config.json: expected an object; got {found!r}",
        hint="take it out if the weights are stored plainly, else restore the one they were quantised with",
    )


def codecs_for(quantization_config: Mapping[str, object] | None) -> tuple[Codec, ...]:
    """Codecs that `quantization_config` of a config.json may store tensors with; () for None.

    Which tensors they apply to is read off the stored names (`assemble`), not off the config's skip lists. The dtype
    of stored scales is not in the config: replace `scale_dtype` by the header's. Raises UnsupportedError for a method
    without a codec.
    """
    if quantization_config is None:
        return ()
    method = quantization_config.get("quant_method")
    if method == "fp8":
        return _fp8(quantization_config)
    if method == "mxfp4":
        return (CODECS["mxfp4"],)
    if method == "compressed-tensors":
        return _compressed_tensors(quantization_config)
    said = "no `quant_method`" if method is None else f"`quant_method: {method}`"
    raise UnsupportedError(f"`quantization_config` in config.json has {said}, for which there is no codec", hint=_HINT)


def _fp8(config: Mapping[str, object]) -> tuple[Codec, ...]:
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedError(f"no codec for FP8 with `expert_dtype: {config['expert_dtype']}`", hint=_HINT)
    block = config.get("weight_block_size")
    if block is None:
        return (Fp8Scaled(strategy="tensor", scale_suffix="_scale_inv"),)
    rule: Literal["ue8m0", "amax"] = "ue8m0" if config.get("scale_fmt") == "ue8m0" else "amax"
    return (Fp8Block(block=_block(block), scale_rule=rule),)


def _block(value: object) -> tuple[int, int]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        rows, columns = value
        if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
            return rows, columns
    raise UnsupportedError(f"`weight_block_size`: expected two positive whole numbers; got {value!r}", hint=_HINT)


def _compressed_tensors(config: Mapping[str, object]) -> tuple[Codec, ...]:
    """One codec a config group; groups may share one."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedError("compressed-tensors without `config_groups`", hint=_HINT)
    codecs: list[Codec] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
            continue  # a group that quantises activations or the cache only stores its weights plainly
        codec = _weights_codec(str(name), group.get("format") or config.get("format"), weights)
        if codec not in codecs:
            codecs.append(codec)
    return tuple(codecs)


def _weights_codec(name: str, storage: object, weights: Mapping[str, object]) -> Codec:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    symmetric, group = weights.get("symmetric", True), weights.get("group_size")
    if (storage, bits, kind, strategy, symmetric) == ("pack-quantized", 4, "int", "group", True):
        if isinstance(group, int) and group > 0 and group % 8 == 0 and not weights.get("actorder"):
            return Int4Packed(group=group)
    elif (bits, kind, symmetric) == (8, "float", True) and storage in ("float-quantized", "naive-quantized"):
        if strategy == "tensor":
            return Fp8Scaled(strategy="tensor")
        if strategy == "channel":
            return Fp8Scaled(strategy="channel")
    raise UnsupportedError(
        f"no codec for compressed-tensors group `{name}`: format {storage}, {bits}-bit {kind}, strategy {strategy}, "
        f"symmetric {symmetric}, group_size {group}, actorder {weights.get('actorder')}",
        hint=_HINT,
    )
