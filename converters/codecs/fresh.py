"""Codecs for a model that was not quantised, and what its config.json says of them then.

Weights are rounded to the nearest code; activations are quantised by the engine as it runs, where a kind asks for
that, under scales that it finds then, or that a calibration found before. Written as vLLM, SGLang and Transformers
read them: Transformers' own FP8 by blocks, the rest as compressed-tensors (`quantization/quant_config.py`,
`quant_scheme.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from converters.codecs.base import Codec
from converters.codecs.calibration import Vector, fp8_input_scale, nvfp4_input_scale
from converters.codecs.decode import Encoded
from converters.codecs.fp8 import Fp8Block, Fp8Scaled
from converters.codecs.int4 import Int4Packed
from converters.codecs.int8 import Int8
from converters.codecs.mx import GROUP, Mxfp4Packed, Mxfp8
from converters.codecs.mxfp4 import Mxfp4
from converters.codecs.nvfp4 import Nvfp4
from converters.errors import LayoutError
from converters.rows.expr import Value
from converters.tensors import Shape, StoredTensor

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """A scale that a product's inputs have once and for all: an fp32 tensor `suffix` [1] beside the weight, which
    `scale` makes of their largest magnitude. `settings` are `quantization_config` then."""

    suffix: str
    scale: Callable[[float], Vector]
    settings: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Fresh:
    """A codec, the safetensors dtype of each part, and `quantization_config` but for the list, under `plain_key`, of
    the modules that stay plain. `multiple`: what a row's length divides by. `inputs`: how a calibration's maxima are
    stored. `scaled`: whether scales of channels are chosen for it; its codes are of 4 bits, its own scales of a part
    of a row. `stacked`: it is of tensors [expert, in, out] and no others. `own`: what stands for it in models of a
    type that engines read in a form of its own."""

    codec: Codec
    dtypes: Mapping[str, str]
    settings: Mapping[str, Value]
    plain_key: str = "ignore"
    multiple: int = 1
    inputs: StaticInputs | None = None
    scaled: bool = False
    stacked: bool = False
    own: Mapping[str, Fresh] = field(default_factory=dict)

    def of(self, model_types: Iterable[str]) -> Fresh:
        """This, or what stands for it in a model of one of `model_types`."""
        return next((self.own[name] for name in model_types if name in self.own), self)

    def module(self, name: str, shape: Shape) -> str | None:
        """The module of a tensor that may be stored so, or is listed as plain; None where it is none."""
        if self.stacked and len(shape) == 3:
            return name.rpartition(".")[0]
        return name.removesuffix(_WEIGHT) if name.endswith(_WEIGHT) and len(shape) > 1 else None

    def config(self, plain: Iterable[str], *, static: bool = False) -> dict[str, Value]:
        """`quantization_config` of a model whose modules `plain` are not quantised; `static`: scales of inputs are
        stored."""
        settings = self.inputs.settings if static and self.inputs is not None else self.settings
        return {**settings, self.plain_key: sorted(set(plain))}

    def encoded(self, name: str, dtype: str, shape: Shape) -> Encoded | None:
        """A tensor in this codec's parts; None where it has a shape that they do not hold."""
        if len(shape) != 2 + self.stacked or shape[1] % self.multiple:
            return None
        try:
            shapes = self.codec.stored_shapes(shape)
        except LayoutError:
            return None
        parts = {
            role: StoredTensor(part, self.dtypes[role], shapes[role], ())
            for role, part in self.codec.part_names(name).items()
        }
        return Encoded(StoredTensor(name, dtype, shape, ()), self.codec, parts)


def _compressed(
    storage: str,
    bits: int,
    kind: str,
    strategy: str,
    group: int | None,
    inputs: Mapping[str, Value] | None,
    exponents: bool = False,
) -> dict[str, Value]:
    """compressed-tensors' config; `inputs`: how activations are quantised, if they are; `exponents`: scales are."""
    common: dict[str, Value] = {"num_bits": bits, "type": kind, "symmetric": True, "actorder": None}
    if exponents:
        common["scale_dtype"] = "torch.uint8"
    weights: Value = {**common, "strategy": strategy, "group_size": group, "dynamic": False}
    activations: Value = None if inputs is None else {**common, "group_size": None, **inputs}
    groups: Value = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
        }
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": storage,
        "config_groups": groups,
        "kv_cache_scheme": None,
    }


#: Activations are quantised as the model runs, a token or a tensor at a time.
_BY_TOKEN: Mapping[str, Value] = {"strategy": "token", "dynamic": True}
_BY_TENSOR: Mapping[str, Value] = {"strategy": "tensor", "dynamic": True}
_BY_BLOCK: Mapping[str, Value] = {"strategy": "group", "group_size": GROUP, "dynamic": True}
#: The scale of a tensor is stored; a block's own is found as the model runs.
_BLOCKS_IN_TENSOR: Mapping[str, Value] = {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
_BLOCKS: Mapping[str, Value] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
#: As Transformers, vLLM and SGLang read it (`integrations/mxfp4.py`): experts alone, [expert, in, out].
_GPT_OSS = Fresh(
    Mxfp4(),
    {"blocks": "U8", "scale": "U8"},
    {"quant_method": "mxfp4"},
    "modules_to_not_convert",
    multiple=GROUP,
    stacked=True,
)
#: By the name that an export is given.
FRESH: Mapping[str, Fresh] = MappingProxyType(
    {
        "fp8_block": Fresh(Fp8Block(), {"weight": "F8_E4M3", "scale": "F32"}, _BLOCKS, "modules_to_not_convert"),
        "fp8_channel": Fresh(
            Fp8Scaled(strategy="channel"),
            {"weight": "F8_E4M3", "scale": "F32"},
            _compressed("float-quantized", 8, "float", "channel", None, _BY_TOKEN),
        ),
        "fp8_tensor": Fresh(
            Fp8Scaled(strategy="tensor"),
            {"weight": "F8_E4M3", "scale": "F32"},
            _compressed("float-quantized", 8, "float", "tensor", None, _BY_TENSOR),
            inputs=StaticInputs(
                ".input_scale",
                fp8_input_scale,
                _compressed("float-quantized", 8, "float", "tensor", None, {**_BY_TENSOR, "dynamic": False}),
            ),
        ),
        "mxfp8": Fresh(
            Mxfp8(),
            {"codes": "F8_E4M3", "scale": "U8"},
            _compressed("mxfp8-quantized", 8, "float", "group", GROUP, _BY_BLOCK, exponents=True),
            multiple=GROUP,
        ),
        "int8_channel": Fresh(
            Int8(),
            {"codes": "I8", "scale": "BF16"},
            _compressed("int-quantized", 8, "int", "channel", None, _BY_TOKEN),
        ),
        "int4_group": Fresh(
            Int4Packed(group=128),
            {"packed": "I32", "scale": "BF16", "shape": "I64"},
            _compressed("pack-quantized", 4, "int", "group", 128, None),
            multiple=128,
            scaled=True,
        ),
        "mxfp4": Fresh(
            Mxfp4Packed(),
            {"codes": "U8", "scale": "U8"},
            _compressed("mxfp4-pack-quantized", 4, "float", "group", GROUP, None, exponents=True),
            multiple=GROUP,
            scaled=True,
            own={"gpt_oss": _GPT_OSS},
        ),
        "nvfp4": Fresh(
            Nvfp4(inverse=True),
            {"codes": "U8", "scale": "F8_E4M3", "whole": "F32"},
            _compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", 16, None),
            multiple=16,
            scaled=True,
            inputs=StaticInputs(
                ".input_global_scale",
                nvfp4_input_scale,
                _compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", 16, _BLOCKS_IN_TENSOR),
            ),
        ),
    }
)


def declared_plain(quantization: Mapping[str, object] | None) -> tuple[str, ...]:
    """Modules that a `quantization_config` says are not quantised, by whichever key."""
    found = (quantization or {}).get("ignore") or (quantization or {}).get("modules_to_not_convert") or ()
    return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list | tuple) else ()
