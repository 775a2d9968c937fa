"""Every published kind of quantised folder: decoded as its own library does, and encoded again to the byte.

What a folder stands for is computed here from its stored bytes by the formula that the library publishes, with none of
the codecs' code: each formula's origin stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.errors import MbxError, UnsupportedError
from fixtures.make_tiny import make
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from tests.formats._quantised import Parts, Stored, compressed, stored_as

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, utils/packing_utils.py
GROUP = 16


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and value = code * scale in fp32, rounded once (Transformers, integrations/finegrained_fp8.py)."""
    codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, (codes.float() * scale).to(torch.bfloat16)


def fp8_tensor(suffix: str, weight: torch.Tensor) -> Stored:
    scale = (weight.float().abs().max() / 448 * 1.01).reshape(())
    codes, value = fp8(weight, scale)
    return {"weight": codes, suffix: scale, "input_scale": torch.tensor(0.01), "k_scale": torch.tensor(0.5)}, value


def fp8_rows(weight: torch.Tensor) -> Stored:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes, value = fp8(weight, scale)
    return {"weight": codes, "weight_scale": scale, "input_scale_ub": torch.tensor(1200.0)}, value


def fp8_blocks(weight: torch.Tensor) -> Stored:
    rows, cols = (-(-n // GROUP) for n in weight.shape)
    scale = torch.rand(rows, cols) * 0.001 + 0.0005
    wide = scale.repeat_interleave(GROUP, 0)[: weight.shape[0]].repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    codes, value = fp8(weight, wide)
    return {"weight": codes, "weight_scale": scale}, value


def int8(group: int | None, packed: bool, weight: torch.Tensor) -> Stored:
    """`x_q.to(scale.dtype) * scale` (compressed-tensors, quantization/lifecycle/forward.py, `_dequantize`)."""
    width = group or weight.shape[1]
    blocks = weight.float().reshape(len(weight), -1, width)
    scale = (blocks.abs().amax(-1) / 127).to(torch.bfloat16)
    codes = (blocks / scale.float().unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
    value = (codes.to(scale.dtype) * scale.unsqueeze(-1)).reshape(weight.shape)
    codes = codes.reshape(weight.shape)
    if not packed:
        return {"weight": codes, "weight_scale": scale}, value
    raw = (codes.numpy().astype(np.int16) + 128).astype(np.uint8)
    words = torch.from_numpy(np.ascontiguousarray(raw).view("<i4"))
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, value


def int4_rows(weight: torch.Tensor) -> Stored:
    scale = (weight.float().abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).round().clamp(-8, 7).to(torch.int64)
    words = words_of((codes + 8).numpy(), range(8))
    parts = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return parts, codes.to(scale.dtype) * scale


def words_of(codes: np.ndarray, order: object) -> torch.Tensor:
    """Eight codes of 0 to 15 along the last dimension in one int32, that of place `order[i]` in nibble i."""
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for nibble, place in enumerate(order):  # type: ignore[call-overload]
        out |= codes[:, place::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(out.view(np.int32))


def nvfp4(weight: torch.Tensor) -> Stored:
    """`e2m1[code] * (scale.float() * scale_2)` (Model Optimizer, quantization/qtensor/nvfp4_tensor.py)."""
    blocks = weight.float().reshape(len(weight), -1, 16)
    whole = blocks.abs().max() / (6 * 448)
    scale = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    factor = scale.float() * whole
    codes = (blocks.unsqueeze(-1) / factor[..., None, None] - E2M1).abs().argmin(-1).reshape(weight.shape)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    value = (E2M1[codes].reshape(blocks.shape) * factor.unsqueeze(-1)).reshape(weight.shape).to(torch.bfloat16)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(1.0)}, value


def nvfp4_packed(weight: torch.Tensor) -> Stored:
    """`e2m1[code] * (scale.float() / global_scale)` (compressed-tensors, compressors/nvfp4/base.py)."""
    blocks = weight.float().reshape(len(weight), -1, 16)
    whole = (6 * 448 / blocks.abs().max()).reshape(1)
    scale = (blocks.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    factor = scale.float() / whole
    codes = (blocks.unsqueeze(-1) / factor[..., None, None] - E2M1).abs().argmin(-1).reshape(weight.shape)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    value = (E2M1[codes].reshape(blocks.shape) * factor.unsqueeze(-1)).reshape(weight.shape).to(torch.bfloat16)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
    return {**parts, "input_global_scale": torch.ones(1)}, value


def four_bits(weight: torch.Tensor, group: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """Codes [in, out], zeros and scales [groups, out], and (code - zero) * scale in fp16, turned round."""
    inputs = weight.float().t()
    zeros = torch.randint(0, 10, (int(group.max()) + 1, inputs.shape[1]))
    scale = torch.stack([inputs[group == g].abs().amax(0) / 5 for g in range(len(zeros))]).half()
    codes = ((inputs / scale.float()[group]).round() + zeros[group]).clamp(0, 15).long()
    return codes.numpy(), zeros.numpy(), scale, ((codes - zeros[group]).half() * scale[group]).t().contiguous()


def gptq(version: int, weight: torch.Tensor) -> Stored:
    """GPTQModel, utils/model.py: of a word of eight zeros 0x11111111 is taken off; inputs lie eight to a word."""
    group = torch.randperm(weight.shape[1]) // GROUP  # an order of activations
    codes, zeros, scale, value = four_bits(weight, group)
    packed = words_of(np.ascontiguousarray(codes.T), range(8)).t().contiguous()
    stored = words_of(zeros, range(8)) - (0x11111111 if version == 1 else 0)
    return {"qweight": packed, "qzeros": stored, "scales": scale, "g_idx": group.int()}, value


def awq(weight: torch.Tensor) -> Stored:
    codes, zeros, scale, value = four_bits(weight, torch.arange(weight.shape[1]) // GROUP)
    return {"qweight": words_of(codes, AWQ_ORDER), "qzeros": words_of(zeros, AWQ_ORDER), "scales": scale}, value


def kind(make_parts: Callable[..., Stored], *arguments: object) -> Callable[[torch.Tensor], Stored]:
    return lambda weight: make_parts(*arguments, weight)


FP8_TENSOR = kind(fp8_tensor, "weight_scale")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
PACKED_NVFP4 = compressed("nvfp4-pack-quantized", 4, "float", strategy="tensor_group", group_size=16)
BLOCKS = compressed("float-quantized", 8, "float", strategy="block", block_structure=[GROUP, GROUP])
BY_GROUP = compressed("pack-quantized", 8, "int", strategy="group", group_size=GROUP)

#: Name → how a matrix is stored, quantization_config, and whether it stands in ModelOpt's own file.
KINDS: dict[str, tuple[Callable[[torch.Tensor], Stored], dict[str, object], bool]] = {
    "fp8, weight_scale": (FP8_TENSOR, {"quant_method": "fp8", "activation_scheme": "static"}, False),
    "fp8, weight_scale_inv": (kind(fp8_tensor, "weight_scale_inv"), {"quant_method": "fp8"}, False),
    "fbgemm": (fp8_rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, False),
    "ModelOpt FP8": (FP8_TENSOR, {"quant_method": "modelopt", "quant_algo": "FP8"}, False),
    "ModelOpt FP8, apart": (FP8_TENSOR, {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, True),
    "ModelOpt NVFP4": (nvfp4, NVFP4, True),
    "NVFP4, packed": (nvfp4_packed, PACKED_NVFP4, False),
    "FP8 blocks": (fp8_blocks, BLOCKS, False),
    "INT8 channel": (kind(int8, None, False), compressed("int-quantized", 8, "int", strategy="channel"), False),
    "W8A16 channel": (kind(int8, None, True), compressed("pack-quantized", 8, "int", strategy="channel"), False),
    "W8A16 group": (kind(int8, GROUP, True), BY_GROUP, False),
    "W4A16 channel": (int4_rows, compressed("pack-quantized", 4, "int", strategy="channel"), False),
    "GPTQ": (kind(gptq, 1), {**GPTQ, "desc_act": True}, False),
    "GPTQ v2": (kind(gptq, 2), {**GPTQ, "checkpoint_format": "gptq_v2"}, False),
    "AWQ": (awq, AWQ, False),
}


def quantised(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The tiny Llama stored as one of KINDS; what its tensors stand for."""
    store, quantization, apart = KINDS[name]
    return stored_as(store, quantization, folder, apart=apart)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_decoded_by_its_formula_and_encoded_again_to_the_byte(tmp_path: Path, name: str) -> None:
    values = quantised(name, tmp_path / "source")
    run(plan_hf_to_mcore(tmp_path / "source", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options()))
    got = load_file(tmp_path / "plain" / "model.safetensors")
    assert got.keys() == values.keys()
    assert [key for key in got if got[key].dtype != values[key].dtype or not torch.equal(got[key], values[key])] == []
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "same", Options(codec="same")))
    for path in (tmp_path / "source").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes(), path.name


def test_a_wrong_zero_is_seen(tmp_path: Path) -> None:
    """The control: zeros read as those of the other version are not what the folder stands for."""
    values = quantised("GPTQ", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(path.read_text().replace('"desc_act": true', '"desc_act": true, "checkpoint_format": "gptq_v2"'))
    run(plan_hf_to_mcore(tmp_path / "source", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options()))
    got = load_file(tmp_path / "plain" / "model.safetensors")
    wrong = [key for key in got if not torch.equal(got[key], values[key])]
    assert wrong and all("_proj" in key for key in wrong)


#: Quantiles of a normal distribution (bitsandbytes, csrc/kernels.cu, `dDequantizeNF4`), to float's precision.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(nested: bool, weight: torch.Tensor) -> Stored:
    """`quant_map[code] * absmax`, nested ones `code2[absmax] * absmax2 + offset` (bitsandbytes, functional.py)."""
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    extra: Parts = {}
    stored = absmax
    if nested:
        offset, table = float(absmax.mean()), torch.linspace(-1, 1, 256)
        rest = absmax - offset
        largest = torch.stack([part.abs().max() for part in rest.split(256)])
        wide = largest.repeat_interleave(256)[: len(rest)]
        stored = (rest / wide - table[:, None]).abs().argmin(0).to(torch.uint8)
        absmax = table[stored.long()] * wide + offset
        extra = {"weight.nested_absmax": largest, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
    codes = (blocks / absmax[:, None] - NF4[:, None, None]).abs().argmin(0)
    value = (NF4[codes] * absmax[:, None]).to(torch.bfloat16).reshape(weight.shape)
    flat = codes.flatten()
    packed = (flat[0::2] << 4 | flat[1::2]).to(torch.uint8).reshape(-1, 1)
    said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts = {"weight": packed, "weight.absmax": stored, "weight.quant_map": NF4.clone(), **extra}
    return {**parts, "weight.quant_state.bitsandbytes__nf4": said}, value


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_bitsandbytes_is_read_and_said_not_to_be_written(tmp_path: Path, nested: bool) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
    KINDS["nf4"] = (kind(nf4, nested), quantization, False)
    values = quantised("nf4", tmp_path / "source")
    del KINDS["nf4"]
    run(plan_hf_to_mcore(tmp_path / "source", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options()))
    got = load_file(tmp_path / "plain" / "model.safetensors")
    assert got.keys() == values.keys()
    assert [key for key in got if got[key].dtype != values[key].dtype or not torch.equal(got[key], values[key])] == []
    with pytest.raises(UnsupportedError, match="read and not written"):
        plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "same", Options(codec="same"))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, "AWQ with 4 bits"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 16}, "GPTQ with 3 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        (compressed("pack-quantized", 4, "int", strategy="group", group_size=16, actorder="group"), "actorder group"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo: MIXED_PRECISION"),
        (compressed("pack-quantized", 4, "int", strategy="channel", symmetric=False), "symmetric False"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
    ],
)
def test_a_kind_that_is_not_read_is_named_with_the_way_out(
    tmp_path: Path, quantization: dict[str, object], words: str
) -> None:
    quantised("GPTQ", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    with pytest.raises(UnsupportedError, match=words) as caught:
        plan_hf_to_mcore(tmp_path / "source", tmp_path / "mcore", Options())
    assert "dequantise it with the library that wrote it" in (caught.value.hint or "")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "source"]


def test_a_config_left_over_on_plain_weights_is_a_note(tmp_path: Path) -> None:
    """What a merge into a model that was loaded in 8 bits leaves behind."""
    make("llama", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    left = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": left}))
    job = plan_hf_to_mcore(tmp_path / "source", tmp_path / "mcore", Options())
    assert any("quantised by bitsandbytes, and no tensor is" in note for note in job.plan.notes)


def test_no_hint_proposes_to_leave_scales_out(tmp_path: Path) -> None:
    """A config that lost its `quantization_config`: the parts are named for what they are."""
    quantised("fp8, weight_scale", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(MbxError) as caught:
        plan_hf_to_mcore(tmp_path / "source", tmp_path / "mcore", Options())
    assert "parts of quantised weights" in (caught.value.hint or "") and "allow-unused" not in (
        caught.value.hint or ""
    )
