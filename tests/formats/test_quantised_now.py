"""A codec chosen on export: every value near its code, read back by the same bytes, told in config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from _codec_models import MODELS
from safetensors.torch import load_file, save_file

from converters.codecs.fresh import FRESH
from converters.errors import UsageError
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

#: What a code may be off by, in parts of the largest magnitude under its scale: half the widest step of a code, and
#: for scales of 16 or 8 bits their own rounding.
BOUND = {
    "fp8_block": 16 / 448,
    "fp8_channel": 16 / 448,
    "fp8_tensor": 16 / 448,
    "int8_channel": 0.5 / 127.5 + 2**-8,
    "int4_group": 0.5 / 7.5 + 2**-8,
    "nvfp4": 1 / 6 + 2**-4,
    # codes from 256 on, or from 4, stand in steps of 32, or 2; the largest may be the first of them
    "mxfp8": 16 / 256,
    "mxfp4": 1 / 4,
}
GROUP = {"fp8_block": (128, 128), "fp8_channel": (1, 0), "fp8_tensor": (0, 0), "int8_channel": (1, 0)}
GROUP |= {"int4_group": (1, 128), "nvfp4": (1, 16), "mxfp8": (1, 32), "mxfp4": (1, 32)}
#: Two modules of one product, where a family has none in its attention.
JOINED = {"deepseek_v3": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hf` and its checkpoint `mcore`, in two tensor-parallel parts."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().bfloat16().save_pretrained(home / "hf")
    run(plan_hf_to_mcore(home / "hf", home / "mcore", Options()))
    return home


def largest(weight: torch.Tensor, codec: str) -> torch.Tensor:
    """The largest magnitude under the scale of each element."""
    rows, columns = (size or whole for size, whole in zip(GROUP[codec], weight.shape, strict=True))
    out = torch.empty_like(weight)
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            part = weight[top : top + rows, left : left + columns]
            out[top : top + rows, left : left + columns] = part.abs().max()
    return out


@pytest.mark.parametrize("codec", FRESH)
def test_values_are_the_nearest_codes_and_come_back_by_the_same_bytes(model: Path, codec: str, tmp_path: Path) -> None:
    run(plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec=codec)))
    run(plan_hf_to_mcore(tmp_path / "q", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "again", Options(codec="same")))
    source, plain = load_file(model / "hf" / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == source.keys()
    coded = 0
    for name, weight in source.items():
        if "proj" not in name:
            assert torch.equal(plain[name], weight), name
            continue
        wide, off = weight.float(), (plain[name].float() - weight.float()).abs()
        assert (off <= BOUND[codec] * largest(wide, codec) + 2**-8 * wide.abs()).all(), name  # decoded in bf16
        assert off.max() > 0
        coded += 1
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert len(stored) - len(source) == coded * (len(FRESH[codec].dtypes) - 1)
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("codec", FRESH)
def test_parity_holds_its_codes_and_finds_a_wrong_one(model: Path, codec: str, tmp_path: Path) -> None:
    run(plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec=codec, exclude=("*.layers.0.*",))))
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    plain = said[FRESH[codec].plain_key]
    assert {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.o_proj"} <= set(plain)
    assert not any(".layers.1.self_attn" in name for name in plain)
    assert parity(tmp_path / "q", model / "mcore", codec=codec).proved
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("model.layers.1.self_attn.o_proj.weight"))
    tensors[name].view(torch.uint8)[3, 5] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert not parity(tmp_path / "q", model / "mcore", codec=codec).proved


def test_what_is_excluded_is_said_and_a_folder_s_own_list_is_no_pattern(model: Path, tmp_path: Path) -> None:
    job = plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec="fp8_block", exclude=("*.layers.9.*",)))
    assert any("‹exclude› '*.layers.9.*' had no effect" in note for note in job.plan.notes)
    run(job)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("*")
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert parity(tmp_path / "q", model / "mcore", codec="fp8_block").proved


@pytest.mark.parametrize("codec", ["fp8_channel", "int4_group", "mxfp4"])
def test_one_wrong_tensor_of_a_joined_product_leaves_the_others_compared(
    model: Path, codec: str, tmp_path: Path
) -> None:
    run(plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec=codec)))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    joined = JOINED.get(config["model_type"], ("self_attn.q_proj", "self_attn.k_proj"))
    first, second = (f"model.layers.1.{module}" for module in joined)
    config["quantization_config"]["ignore"].append(first)  # which it quantised
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert not parity(tmp_path / "q", model / "mcore", codec=codec).proved

    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith(f"{second}.weight"))
    tensors[name].view(torch.uint8)[3, 5] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = parity(tmp_path / "q", model / "mcore", codec=codec)
    assert any(name.startswith(difference.name) for difference in found.differences), "beside the first in one product"


def test_what_no_codec_is_for_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tensor takes it"):
        plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec="fp8_block", exclude=("*",)))
    with pytest.raises(UsageError, match="is for a `codec` that is chosen now"):
        plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(exclude=("*",)))
    with pytest.raises(UsageError, match="is not known"):
        plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec="fp5"))


@pytest.mark.slow
@pytest.mark.parametrize("codec", FRESH)
def test_what_rounding_costs_is_stated_and_the_import_computes_the_same(
    model: Path, codec: str, tmp_path: Path
) -> None:
    run(plan_mcore_to_hf(model / "mcore", tmp_path / "q", Options(codec=codec)))
    run(plan_hf_to_mcore(tmp_path / "q", tmp_path / "mcore", Options()))
    cost, same = (
        next(leg for leg in parity(left, right, forward=True).legs if leg.name == "forward")
        for left, right in ((model / "hf", tmp_path / "q"), (tmp_path / "q", tmp_path / "mcore"))
    )
    assert same.status == "passed", same
    nats = re.search(r"KL ([\d.e+-]+) nats", cost.summary)
    assert cost.status == "failed" and nats is not None and 1e-7 < float(nats[1]) < 0.01, cost
