"""Folders quantised by the libraries themselves mean here what the same libraries decode, bit for bit.

`make codecs` installs them beside the environment; a test without its library is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _quantised import Parts, Stored, compressed, stored_as
from safetensors.torch import load_file

from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

GROUP = 16
Store = Callable[[torch.Tensor], Stored]


def library(name: str, package: str) -> Any:
    """A module of a library that may not be installed."""
    return pytest.importorskip(name, reason=f"{package} is not installed: `make codecs` brings it")


def decoded(folder: Path, work: Path) -> Parts:
    """What a folder's tensors mean, by way of a Megatron checkpoint."""
    run(plan_hf_to_mcore(folder, work / "mcore", Options()))
    run(plan_mcore_to_hf(work / "mcore", work / "plain", Options()))
    return load_file(work / "plain" / "model.safetensors")


def check(store: Store, quantization: dict[str, object], work: Path, **how: Any) -> None:
    """The folder means what the library says, and is written again to the byte."""
    expected, got = stored_as(store, quantization, work / "source", **how), decoded(work / "source", work)
    assert got.keys() == expected.keys()
    assert [
        key for key in got if got[key].dtype != expected[key].dtype or not torch.equal(got[key], expected[key])
    ] == []
    if quantization.get("quant_method") == "bitsandbytes":
        return  # read only
    run(plan_mcore_to_hf(work / "mcore", work / "same", Options(codec="same")))
    for path in (work / "source").iterdir():
        assert path.read_bytes() == (work / "same" / path.name).read_bytes(), path.name


# ---- compressed-tensors ------

COMPRESSED: dict[str, tuple[str, int, str, dict[str, object]]] = {
    "W4A16 group": ("pack-quantized", 4, "int", {"strategy": "group", "group_size": GROUP}),
    "W4A16 channel": ("pack-quantized", 4, "int", {"strategy": "channel"}),
    "W8A16 group": ("pack-quantized", 8, "int", {"strategy": "group", "group_size": GROUP}),
    "W8A16 channel": ("pack-quantized", 8, "int", {"strategy": "channel"}),
    "INT8 channel": ("int-quantized", 8, "int", {"strategy": "channel"}),
    "FP8 tensor": ("float-quantized", 8, "float", {"strategy": "tensor"}),
    "FP8 channel": ("float-quantized", 8, "float", {"strategy": "channel"}),
    "FP8 block": ("float-quantized", 8, "float", {"strategy": "block", "block_structure": [GROUP, GROUP]}),
    "MXFP8": ("mxfp8-quantized", 8, "float", {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    "MXFP4": (
        "mxfp4-pack-quantized",
        4,
        "float",
        {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}


def scales(weight: torch.Tensor, strategy: str, largest: float) -> torch.Tensor:
    """Scales that hold a weight, in its dtype."""
    rows, width = weight.shape
    if strategy == "tensor":
        amax = weight.abs().max().reshape(1)
    elif strategy == "channel":
        amax = weight.abs().amax(1, keepdim=True)
    elif strategy == "group":
        amax = weight.reshape(rows, -1, GROUP).abs().amax(-1)
    else:
        high, wide = math.ceil(rows / GROUP), math.ceil(width / GROUP)
        padded = torch.zeros(high * GROUP, wide * GROUP, dtype=weight.dtype)
        padded[:rows, :width] = weight
        amax = padded.reshape(high, GROUP, wide, GROUP).abs().amax((1, 3))
    return (amax.float() / largest).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base = library("compressed_tensors.compressors", "compressed-tensors")
    quantization = library("compressed_tensors.quantization", "compressed-tensors")
    storage, bits, kind, weights = COMPRESSED[name]
    args = quantization.QuantizationArgs(num_bits=bits, type=kind, symmetric=True, **weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=storage)
    codec = base.BaseCompressor.get_value_from_registry(storage)
    largest = 448.0 if kind == "float" else 2.0 ** (bits - 1) - 0.5

    def store(weight: torch.Tensor) -> Stored:
        scale = scales(weight, str(weights["strategy"]), largest)
        if "scale_dtype" in weights:  # powers of two, one a 32 of a row, some under which codes saturate
            blocks = weight.float().reshape(len(weight), -1, 32)
            scale = torch.exp2((blocks.abs().amax(-1) / (largest if bits == 8 else 6.0)).log2().round()).to(
                weight.dtype
            )
        parts = codec.compress({"weight": weight, "weight_scale": scale}, scheme)
        return parts, codec.decompress(parts, scheme)["weight"]

    check(store, compressed(storage, bits, kind, **weights), tmp_path, dtype=dtype)


def test_compressed_tensors_nvfp4(tmp_path: Path) -> None:
    base = library("compressed_tensors.compressors", "compressed-tensors")
    quantization = library("compressed_tensors.quantization", "compressed-tensors")
    weights: dict[str, object] = {"strategy": "tensor_group", "group_size": 16}
    args = quantization.QuantizationArgs(num_bits=4, type="float", symmetric=True, **weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format="nvfp4-pack-quantized")
    codec = base.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")

    def store(weight: torch.Tensor) -> Stored:
        whole = (448 * 6 / weight.float().abs().max()).reshape(1)
        scale = (weight.float().reshape(len(weight), -1, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
        held = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_global_scale": whole}
        parts = codec.compress(held, scheme)
        return parts, codec.decompress(parts, scheme)["weight"]

    check(store, compressed("nvfp4-pack-quantized", 4, "float", **weights), tmp_path)


# ---- Model Optimizer ------


def test_model_optimizer_nvfp4(tmp_path: Path) -> None:
    kind = library("modelopt.torch.quantization.qtensor", "nvidia-modelopt").NVFP4QTensor

    def store(weight: torch.Tensor) -> Stored:
        packed, scale, whole = kind.quantize(weight, 16)
        value = packed.dequantize(torch.bfloat16, scale=scale, double_scale=whole, block_sizes={-1: 16})
        parts = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
        return parts, value

    check(store, {"quant_algo": "NVFP4", "group_size": 16}, tmp_path, apart=True)


def test_model_optimizer_mxfp8(tmp_path: Path) -> None:
    kind = library("modelopt.torch.quantization.qtensor", "nvidia-modelopt").MXFP8QTensor

    def store(weight: torch.Tensor) -> Stored:
        coded, scale = kind.quantize(weight)
        return {"weight": coded._quantized_data, "weight_scale": scale}, coded.dequantize(weight.dtype, scale=scale)

    check(store, {"quant_algo": "MXFP8", "group_size": 32}, tmp_path, apart=True)


def test_model_optimizer_fp8(tmp_path: Path) -> None:
    kind = library("modelopt.torch.quantization.qtensor", "nvidia-modelopt").FP8QTensor

    def store(weight: torch.Tensor) -> Stored:
        coded, scale = kind.quantize(weight)
        # in fp32, as kernels form it; of another dtype the library rounds the scale first
        value = coded.dequantize(torch.float32, scale=scale.float()).to(weight.dtype)
        return {"weight": coded._quantized_data, "weight_scale": scale.float()}, value

    check(store, {"quant_algo": "FP8"}, tmp_path, apart=True)


# ---- bitsandbytes ------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(tmp_path: Path, kind: str, nested: bool, dtype: torch.dtype) -> None:
    """The dtype of computing is another one, and says nothing of the weights'."""
    functional = library("bitsandbytes.functional", "bitsandbytes")

    def store(weight: torch.Tensor) -> Stored:
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type=kind, quant_storage=torch.uint8
        )
        packed = {f"weight.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
        return {"weight": codes, **packed}, functional.dequantize_4bit(codes, state)

    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "float32"}  # fmt: skip
    check(store, said, tmp_path, dtype=dtype)


# ---- Transformers ------


def test_transformers_fp8_blocks(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    library_own = Fp8Dequantize(None)

    def store(weight: torch.Tensor) -> Stored:
        scale = scales(weight.float(), "block", 448.0)
        wide = scale.repeat_interleave(GROUP, 0)[: len(weight)].repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
        codes = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, library_own._dequantize_one(codes, scale, weight.dtype)

    check(store, {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, tmp_path)
