"""GPT-OSS in MXFP4 is stored in its own form: experts alone, as Transformers decodes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from fixtures.make_tiny import make
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder `hf`, its checkpoint `mcore`, and the export `q`."""
    home = tmp_path_factory.mktemp("gpt_oss")
    make("gpt_oss", home / "hf")
    run(plan_hf_to_mcore(home / "hf", home / "mcore", Options()))
    run(plan_mcore_to_hf(home / "mcore", home / "q", Options(codec="mxfp4")))
    return home


def test_experts_are_stored_as_openai_s_and_come_back(home: Path, tmp_path: Path) -> None:
    source, stored = (load_file(home / name / "model.safetensors") for name in ("hf", "q"))
    experts = [name for name in source if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 2 * 4
    assert {n for n in source if n not in experts} | {
        f"{n}_{part}" for n in experts for part in ("blocks", "scales")
    } == stored.keys()
    said = json.loads((home / "q" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4"
    assert {"lm_head", "model.layers.0.mlp.router", "model.layers.3.self_attn.o_proj"} <= set(
        said["modules_to_not_convert"]
    )
    run(plan_hf_to_mcore(home / "q", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "again", Options(codec="same")))
    assert (home / "q" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    how = Mxfp4Config(dequantize=True)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        home / "q", dtype=torch.bfloat16, quantization_config=how, output_loading_info=True
    )
    assert not any(report.values()), report
    mine = load_file(tmp_path / "plain" / "model.safetensors")
    for name in experts:
        decoded = theirs.get_parameter(name)
        assert torch.equal(decoded, mine[name]) and (decoded.float() - source[name].float()).abs().max() > 0, name


def test_exponents_and_codes_are_torchao_s(home: Path) -> None:
    """By the least exponent under which nothing saturates, which is Triton's encoder's for these models."""
    pytest.importorskip("torchao", reason="it is not installed: `make codecs` brings it")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    source, stored = (load_file(home / name / "model.safetensors") for name in ("hf", "q"))
    for name in [name for name in source if name.endswith(("gate_up_proj", "down_proj"))]:
        rows = source[name].transpose(1, 2).contiguous()
        scale, codes = to_mx(rows, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
        assert torch.equal(scale.view(torch.uint8).reshape(stored[f"{name}_scales"].shape), stored[f"{name}_scales"])
        assert torch.equal(codes.view(torch.uint8).reshape(stored[f"{name}_blocks"].shape), stored[f"{name}_blocks"])


def test_parity_holds_its_codes_and_finds_a_wrong_one(home: Path, tmp_path: Path) -> None:
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="mxfp4", exclude=("*.layers.0.*",))))
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"].count("model.layers.0.mlp.experts") == 1
    assert parity(tmp_path / "q", home / "mcore", codec="mxfp4").proved
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    assert "model.layers.0.mlp.experts.down_proj" in tensors
    tensors["model.layers.1.mlp.experts.down_proj_blocks"][2, 3, 0, 5] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert not parity(tmp_path / "q", home / "mcore", codec="mxfp4").proved


def test_another_codec_says_which_experts_it_leaves(home: Path, tmp_path: Path) -> None:
    notes = plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_channel")).plan.notes
    assert any(
        "8 products have a shape it does not hold, and stay plain: `model.layers.0.mlp.experts" in n for n in notes
    )
