"""The codecs by name, and which of them a checkpoint's `quantization_config` calls for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from converters.codecs.base import Codec
from converters.codecs.fp8 import SCALE_SUFFIXES, Fp8Block, Fp8Scaled
from converters.codecs.int4 import Int4Packed
from converters.codecs.int8 import Int8
from converters.codecs.mx import GROUP, Mxfp4Packed, Mxfp8
from converters.codecs.mxfp4 import Mxfp4
from converters.codecs.nf4 import Nf4
from converters.codecs.nvfp4 import Nvfp4
from converters.codecs.words4 import Words4
from converters.errors import UnsupportedError, UsageError
from converters.rows.config_spelling import text_key
from converters.rows.expr import Value

#: Each codec with the settings most checkpoints use.
CODECS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in (Fp8Block(), Mxfp4(), Int4Packed(), Fp8Scaled())}
)

#: The key under which `quantization_of` says a model's own dtype: what its weights had before they were quantised.
MODEL_DTYPE = "model_dtype"

_HINT = (
    "dequantise it with the library that wrote it, in Transformers `model.dequantize()` and `save_pretrained`, and "
    "convert that folder; read here are FP8 (Transformers, fbgemm, compressed-tensors, ModelOpt), MXFP8, MXFP4, "
    "NVFP4, INT4 and INT8 of compressed-tensors, GPTQ, AWQ and bitsandbytes of 4 bits"
)


def quantization_of(config: Mapping[str, Value]) -> Mapping[str, Value] | None:
    """`quantization_config` of a config.json, None where it has none; UsageError where it is not an object.

    Some models around a text model say it of that alone. bitsandbytes' is given the model's dtype, `MODEL_DTYPE`.
    """
    found, text = config.get("quantization_config"), config.get(text_key(config))
    if found is None and isinstance(text, Mapping):
        found = text.get("quantization_config")
    if isinstance(found, Mapping) and found.get("quant_method") == "bitsandbytes":
        sides = [config, text if isinstance(text, Mapping) else {}]
        said = next((side[key] for side in sides for key in ("dtype", "torch_dtype") if side.get(key)), None)
        return {**found, MODEL_DTYPE: said}
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
    found = _METHODS.get(method) if isinstance(method, str) else None
    if found is not None:
        return found(quantization_config)
    if method is None and {"bits", "group_size"} <= quantization_config.keys():
        raise UnsupportedError(
            "`quantization_config` in config.json is MLX's, whose packed weights no codec reads",
            hint="`mlx_lm.convert --hf-path DIR --mlx-path PLAIN -d` dequantises it; or convert the repository that "
            "it was made from",
        )
    said = "no `quant_method`" if method is None else f"`quant_method: {method}`"
    raise UnsupportedError(f"`quantization_config` in config.json has {said}, for which there is no codec", hint=_HINT)


def _fp8(config: Mapping[str, object]) -> tuple[Codec, ...]:
    """Transformers' FP8: by blocks, or by tensor, whatever its scales are called."""
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedError(f"no codec for FP8 with `expert_dtype: {config['expert_dtype']}`", hint=_HINT)
    block = config.get("weight_block_size")
    if block is None:
        return tuple(Fp8Scaled(strategy="tensor", scale_suffix=suffix) for suffix in SCALE_SUFFIXES)
    rule: Literal["ue8m0", "amax"] = "ue8m0" if config.get("scale_fmt") == "ue8m0" else "amax"
    return tuple(Fp8Block(_block(block), scale_rule=rule, scale_suffix=suffix) for suffix in SCALE_SUFFIXES)


def _mxfp4(config: Mapping[str, object]) -> tuple[Codec, ...]:
    return (CODECS["mxfp4"],)


def _fbgemm(config: Mapping[str, object]) -> tuple[Codec, ...]:
    return (Fp8Scaled(strategy="channel"),)


def _modelopt(config: Mapping[str, object]) -> tuple[Codec, ...]:
    """NVIDIA Model Optimizer: one algorithm for all layers that it quantised."""
    algorithm, group = config.get("quant_algo"), config.get("group_size") or 16
    if algorithm == "FP8":
        return (Fp8Scaled(strategy="tensor"),)
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return (Fp8Scaled(strategy="channel"),)
    if algorithm == "MXFP8":
        return (Mxfp8(),)
    if algorithm == "NVFP4" and isinstance(group, int):
        return (Nvfp4(group),)
    raise UnsupportedError(f"no codec for ModelOpt's `quant_algo: {algorithm}`", hint=_HINT)


def _bitsandbytes(config: Mapping[str, object]) -> tuple[Codec, ...]:
    """4-bit codes; a value has the dtype that the weights had."""
    kind, nested = config.get("bnb_4bit_quant_type") or "fp4", bool(config.get("bnb_4bit_use_double_quant"))
    if not config.get("load_in_4bit") or kind not in ("nf4", "fp4"):
        raise UnsupportedError("no codec for bitsandbytes in 8 bits", hint=_HINT)
    said = str(config.get(MODEL_DTYPE) or config.get("bnb_4bit_compute_dtype") or "bfloat16").removeprefix("torch.")
    dtypes: dict[str, Literal["BF16", "F16", "F32"]] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return (Nf4(nested, "nf4" if kind == "nf4" else "fp4", dtypes.get(said, "BF16")),)


def _gptq(config: Mapping[str, object]) -> tuple[Codec, ...]:
    bits, group, form = config.get("bits"), config.get("group_size"), config.get("checkpoint_format") or "gptq"
    if bits == 4 and isinstance(group, int) and form in ("gptq", "gptq_v2"):
        return (Words4(group=group if group > 0 else None, zero_offset=1 if form == "gptq" else 0),)
    raise UnsupportedError(f"no codec for GPTQ with {bits} bits, group_size {group}, format {form}", hint=_HINT)


def _awq(config: Mapping[str, object]) -> tuple[Codec, ...]:
    bits, group, version = config.get("bits"), config.get("group_size"), str(config.get("version") or "gemm")
    if bits == 4 and isinstance(group, int) and version.lower() == "gemm":
        return (Words4(awq=True, group=group if group > 0 else None),)
    raise UnsupportedError(f"no codec for AWQ with {bits} bits, group_size {group}, version {version}", hint=_HINT)


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


#: Blocks with an exponent, by their bits and how they are stored.
_MX: Mapping[tuple[object, object], Codec] = {
    (8, "mxfp8-quantized"): Mxfp8(),
    (4, "mxfp4-pack-quantized"): Mxfp4Packed(),
}
#: Orders in which a quantiser may have worked, and that show nowhere in what it stored.
_STATIC_ORDERS = (None, False, "weight", "static")


def _weights_codec(name: str, storage: object, weights: Mapping[str, object]) -> Codec:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    symmetric, group, order = weights.get("symmetric", True), weights.get("group_size"), weights.get("actorder")
    columns = group if strategy == "group" and isinstance(group, int) and group > 0 else None
    grouped = columns is not None or strategy == "channel"
    if kind == "int" and symmetric and grouped and order in _STATIC_ORDERS:
        if storage == "pack-quantized" and bits == 4 and (columns or 8) % 8 == 0:
            return Int4Packed(group=columns)
        if storage == "pack-quantized" and bits == 8:
            return Int8(packed=True, group=columns)
        if storage in ("int-quantized", "naive-quantized") and bits == 8:
            return Int8(group=columns)
    elif (bits, kind, symmetric) == (8, "float", True) and storage in ("float-quantized", "naive-quantized"):
        if strategy == "tensor":
            return Fp8Scaled(strategy="tensor")
        if strategy == "channel":
            return Fp8Scaled(strategy="channel")
        if strategy == "block":
            return Fp8Block(_block(weights.get("block_structure")), scale_suffix="_scale")
    elif (bits, kind, symmetric, strategy) == (4, "float", True, "tensor_group") and storage == "nvfp4-pack-quantized":
        return Nvfp4(group if isinstance(group, int) else 16, inverse=True)
    elif (kind, symmetric, columns) == ("float", True, GROUP) and (bits, storage) in _MX:
        return _MX[bits, storage]
    raise UnsupportedError(
        f"no codec for compressed-tensors group `{name}`: format {storage}, {bits}-bit {kind}, strategy {strategy}, "
        f"symmetric {symmetric}, group_size {group}, actorder {order}",
        hint=_HINT,
    )


_METHODS: Mapping[str, Callable[[Mapping[str, object]], tuple[Codec, ...]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "fbgemm_fp8": _fbgemm,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
