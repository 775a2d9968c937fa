"""Folders quantised on export are, byte for byte, what compressed-tensors makes, and load in Transformers through it.

`make codecs` installs it, and torchao, beside the environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _codec_models import MODELS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from converters.codecs import Mxfp4Packed, Mxfp8
from converters.codecs.fresh import FRESH
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

pytest.importorskip("compressed_tensors", reason="it is not installed: `make codecs` brings it")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

#: All but Transformers' own FP8.
CODECS = [name for name, one in FRESH.items() if one.settings["quant_method"] == "compressed-tensors"]
#: What Transformers 5.23 has no place for where experts are one tensor: exponents of blocks, a scale of the whole
#: tensor, codes of INT8 (`integrations/compressed_tensors.py`, `CompressedTensorsDequantize`).
NOT_AS_EXPERTS = {"mxfp8", "nvfp4", "int8_channel"}


@pytest.fixture(scope="module", params=MODELS)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hf` and its checkpoint `mcore`."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().bfloat16().save_pretrained(home / "hf")
    run(plan_hf_to_mcore(home / "hf", home / "mcore", Options()))
    return home


def scheme_of(said: dict[str, Any]) -> QuantizationScheme:
    """What `quantization_config` says of products, as compressed-tensors reads it."""
    config = QuantizationConfig.model_validate(said)
    return config.config_groups["group_0"].model_copy(update={"format": config.format})


def compressed(weight: torch.Tensor, scheme: QuantizationScheme, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts that compressed-tensors stores of a weight, under the scales that it finds.

    In fp32, in which its rounding is one; scales of 16 bits are rounded to `scale`'s dtype before they are used.
    """
    args, wide = scheme.weights, weight.float()
    if args.strategy == "tensor_group":  # as in its preset NVFP4A16
        args = args.model_copy(update={"scale_dtype": torch.float8_e4m3fn})
    shape = {"tensor": (1, -1), "channel": (len(wide), -1)}.get(args.strategy, (len(wide), -1, args.group_size or -1))
    low, high = (end.reshape(scale.shape) for end in (wide.reshape(shape).amin(-1), wide.reshape(shape).amax(-1)))
    state = {"weight": wide}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(low.min(), high.max()).reshape(1)
    found, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    found = found if args.scale_dtype else found.to(scale.dtype).float()
    state |= {"weight_scale": found, "weight_zero_point": zero}
    parts: dict[str, torch.Tensor] = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    return parts


@pytest.mark.parametrize("codec", CODECS)
def test_every_part_is_what_compressed_tensors_stores(home: Path, codec: str, tmp_path: Path) -> None:
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec=codec)))
    said: dict[str, Any] = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    scheme = scheme_of(said)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for name, weight in load_file(home / "hf" / "model.safetensors").items():
        if "proj" not in name:
            assert torch.equal(stored[name], weight), name
            continue
        stem = name.removesuffix("weight")
        parts = compressed(weight, scheme, stored[f"{name}_scale"])
        mine = {part: stored[stem + part] for part in parts}
        wrong = [part for part in parts if not torch.equal(mine[part], parts[part].to(mine[part].dtype))]
        assert not wrong and len([n for n in stored if n.startswith(f"{stem}weight")]) == len(parts), (name, wrong)


def test_blocks_are_those_of_compressed_tensors_too(home: Path, tmp_path: Path) -> None:
    """Transformers' FP8, whose own encoder rounds the scale twice; DeepSeek's does not, nor does this."""
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_block")))
    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="float-quantized")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        weight, scale = load_file(home / "hf" / "model.safetensors")[name.removesuffix("_scale_inv")], stored[name]
        high, wide = scale.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
        blocks = padded.reshape(high, 128, wide, 128)
        found, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
        state = {"weight": weight.float(), "weight_scale": found, "weight_zero_point": zero}
        codes = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)["weight"]
        assert torch.equal(found, scale) and torch.equal(
            codes.float(), stored[name.removesuffix("_scale_inv")].float()
        )


@pytest.mark.parametrize("codec", CODECS)
def test_a_folder_loads_in_transformers(home: Path, codec: str, tmp_path: Path) -> None:
    """Through compressed-tensors: the weights that the folder stands for, the head and the router as they were."""
    experts = "num_experts" in (text := (home / "hf" / "config.json").read_text()) or "n_routed_experts" in text
    if experts and codec in NOT_AS_EXPERTS:
        pytest.skip(f"Transformers decodes no experts in {codec}")
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec=codec)))
    run(plan_hf_to_mcore(tmp_path / "q", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options()))
    how = CompressedTensorsConfig(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", dtype=torch.bfloat16, quantization_config=how, output_loading_info=True
    )
    assert not any(report.values()), report
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    mine, theirs = ours.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)  # decoded as it runs
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits, exact = kept(ids).logits.float(), ours(ids).logits.float()
    activations = FRESH[codec].settings["config_groups"]["group_0"]["input_activations"]
    off = float((logits - exact).norm() / exact.norm())
    assert off == 0 if activations is None else 0 < off < 0.2  # a router may choose otherwise


@pytest.mark.parametrize("codec", ["mxfp8", "mxfp4", "nvfp4"])
def test_edges_of_blocks_are_what_compressed_tensors_makes_of_them(codec: str) -> None:
    """Zeros, values below every exponent, both sides of where an exponent is rounded up, and ties between codes."""
    rows = [torch.zeros(64), torch.full((64,), 1e-39), torch.full((64,), -2e38), torch.arange(64) / 8]
    rows += [torch.linspace(-top, top, 64) for top in (1.7421875, 1.75, 1.7578125, 1.9921875, 6.0, 7.0, 448.0, 464.0)]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5]).repeat(8) * torch.tensor([1.0, -1.0]).repeat(32)
    groups = torch.stack([*rows, ties, ties * 2**-20, torch.linspace(256, 447, 64)]).bfloat16()
    for weight in [groups] if codec != "nvfp4" else groups[3:].split(1):  # one scale a tensor
        mine = FRESH[codec].codec.encode(weight)
        theirs = compressed(weight, scheme_of(FRESH[codec].config([])), mine["scale"])
        for role, name in FRESH[codec].codec.part_names("weight").items():
            assert torch.equal(mine[role].view(torch.uint8), theirs[name].to(mine[role].dtype).view(torch.uint8)), role


def test_the_rules_of_exponents_are_told_apart() -> None:
    """torchao has them by name. MXFP4's rounds to even. MXFP8's differs from that of Transformer Engine and Model
    Optimizer, the least exponent under which nothing saturates, where the largest magnitude is 448 times a power of
    two: the values are the same."""
    pytest.importorskip("torchao", reason="it is not installed: `make codecs` brings it")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode as Rule
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    weight = (torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    four, eight = Mxfp4Packed().encode(weight), Mxfp8().encode(weight)
    scale, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32, Rule.EVEN)
    assert torch.equal(four["scale"], scale.view(torch.uint8)) and torch.equal(four["codes"], codes.view(torch.uint8))
    assert not torch.equal(to_mx(weight, torch.float4_e2m1fn_x2, 32, Rule.FLOOR)[0].view(torch.uint8), four["scale"])
    scale, codes = to_mx(weight, torch.float8_e4m3fn, 32, Rule.RCEIL)
    edge = torch.frexp(weight.float().reshape(512, 8, 32).abs().amax(-1)).mantissa == 0.875
    assert 0 < edge.sum() < 100
    assert torch.equal(eight["scale"], scale.view(torch.uint8) + edge.to(torch.uint8))
    theirs = {"codes": codes.reshape(weight.shape), "scale": scale.view(torch.uint8)}
    assert torch.equal(Mxfp8().decode(eight), Mxfp8().decode(theirs))
