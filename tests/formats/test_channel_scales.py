"""Scales of channels: the same model before it is rounded, a nearer one after, and a misplaced one is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _codec_models import MODELS
from safetensors.torch import load_file, save_file
from test_calibrated import measured
from transformers import AutoModelForCausalLM

import mbx
from converters.codecs.calibration import Calibration
from converters.errors import UnsupportedError, UsageError
from converters.planning import folds
from fixtures.make_tiny import TINY, make
from mbx.cli import main
from mbx.models.transformers import channel_scales
from mbx.proof.parity import parity
from mbx.run.calibration_file import calibration_bytes, read_calibration
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

LLAMA = TINY / "llama"
NORMS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj", "gate"),
}
FAMILIES = """command_r7b deepseek_v3 gemma2 glm4_moe gpt_oss llama_nemotron llama4_scout minimax_m2 mixtral nemotron
nemotron_nano_v3 nemotron_super olmo3 pythia qwen2_moe qwen3_next starcoder2""".split()
DRAWN = torch.Generator().manual_seed(0)
#: What is measured on, and what the rounded models are compared on.
SEEN, HELD_OUT = (torch.randint(0, 128, (count, 24), generator=DRAWN) for count in (12, 8))


def outlying(file: Path) -> None:
    """Make channels in front of all products of two layers 20 times as large, and what takes them in as much less."""
    tensors = load_file(file)
    for layer in range(2):
        for norm, products in NORMS.items():
            channels = torch.randperm(128, generator=DRAWN)[:6]
            tensors[f"model.layers.{layer}.{norm}.weight"][channels] *= 20
            for name, weight in tensors.items():
                if f".layers.{layer}." in name and name.split(".")[-2] in products:
                    weight[:, channels] /= 20
    for name in [name for name in tensors if name.endswith(("v_proj.weight", "up_proj.weight"))]:
        rows = torch.randperm(len(tensors[name]), generator=DRAWN)[:4]
        tensors[name][rows] *= 20
        if name.endswith("up_proj.weight"):
            tensors[name.replace("up_proj", "down_proj")][:, rows] /= 20
        else:  # two heads of 32 share a group
            columns = torch.cat([rows // 32 * 64 + rows % 32 + head * 32 for head in range(2)])
            tensors[name.replace("v_proj", "o_proj")][:, columns] /= 20
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hf` of a model with outlying channels, its checkpoint `mcore` and scales for INT4."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().bfloat16().save_pretrained(home / "hf")
    outlying(home / "hf" / "model.safetensors")
    run(plan_hf_to_mcore(home / "hf", home / "mcore", Options()))
    (home / "scales").write_bytes(calibration_bytes(measured(home / "hf", SEEN, "int4_group")))
    return home


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor = HELD_OUT) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids, use_cache=False).logits


def divergence(folder: Path, of: torch.Tensor, work: Path) -> float:
    """Mean KL divergence of a quantised folder's model, decoded, from logits."""
    run(plan_hf_to_mcore(folder, work / "mcore", Options()))
    run(plan_mcore_to_hf(work / "mcore", work / "plain", Options()))
    found = logits(work / "plain")
    return float(
        torch.nn.functional.kl_div(found.log_softmax(-1), of.log_softmax(-1), log_target=True, reduction="sum")
    )


def test_before_rounding_it_is_the_same_model(home: Path, tmp_path: Path) -> None:
    found = read_calibration(home / "scales")
    kinds = {name.split(".")[-2] for name in found.scales}
    assert kinds == {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"}
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "same", Options(dtype="fp32", calibration=found)))
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "hf", tmp_path / "same"))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.allclose(before[norm].float(), after[norm], rtol=0.1)
    assert torch.allclose(after[norm].bfloat16().float(), after[norm], rtol=1e-6), "a norm of 16 bits loses nothing"
    assert (logits(tmp_path / "same") - logits(home / "hf")).abs().max() <= 1e-4

    run(plan_mcore_to_hf(home / "mcore", tmp_path / "bf16", Options(calibration=found)))
    leg = next(leg for leg in parity(home / "hf", tmp_path / "bf16").legs if leg.name == "weights")
    assert leg.status == "failed" and "differ by design" in leg.details[0]


@pytest.mark.parametrize("codec", ["int4_group", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_after_rounding_it_is_nearer_on_tokens_not_seen(home: Path, codec: str, tmp_path: Path) -> None:
    found, plain = read_calibration(home / "scales"), logits(home / "hf")
    if codec != found.codec:
        found = measured(home / "hf", SEEN, codec)
    apart = {}
    for name, calibration in (("nearest", None), ("scaled", found)):
        (work := tmp_path / name).mkdir()
        run(plan_mcore_to_hf(home / "mcore", work / "q", Options(codec=codec, calibration=calibration)))
        apart[name] = divergence(work / "q", plain, work)
    assert 0 < apart["scaled"] < 0.7 * apart["nearest"], apart

    scaled = tmp_path / "scaled" / "q"
    said = json.loads((scaled / "config.json").read_text())
    assert said["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None
    assert parity(scaled, home / "mcore", codec=codec, calibration=found).proved
    assert not parity(scaled, home / "mcore", codec=codec).proved


def test_a_scale_in_the_wrong_norm_is_found(home: Path, tmp_path: Path) -> None:
    """The planted fault: what belongs to the norm before attention divides the one behind it."""
    found = read_calibration(home / "scales")
    options = Options(dtype="fp32", calibration=found)
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "right", options))
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "wrong", options))
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    right, wrong = ("model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight")
    scale = torch.from_numpy(found.scales[right].copy())
    tensors[right] *= scale
    tensors[wrong] /= scale
    save_file(tensors, file, metadata={"format": "pt"})
    status = {}
    for name in ("right", "wrong"):
        legs = parity(home / "hf", tmp_path / name, forward=True).legs
        status[name] = next(leg.status for leg in legs if leg.name == "forward")
    assert status == {"right": "passed", "wrong": "failed"}


def test_transformers_reads_the_scaled_folder(home: Path, tmp_path: Path) -> None:
    """Its own loader, by compressed-tensors: nearer than what is rounded as it stands."""
    pytest.importorskip("compressed_tensors", reason="it is not installed: `make codecs` brings it")
    found, plain = read_calibration(home / "scales"), logits(home / "hf")
    apart = []
    for name, calibration in (("nearest", None), ("scaled", found)):
        run(plan_mcore_to_hf(home / "mcore", tmp_path / name, Options(codec="int4_group", calibration=calibration)))
        apart.append(float((logits(tmp_path / name) - plain).norm() / plain.norm()))
    assert 0 < apart[1] < 0.9 * apart[0], apart


def test_nvfp4_has_scales_of_inputs_of_the_scaled_model(home: Path, tmp_path: Path) -> None:
    """Largest magnitudes are those behind the scales: of the folded model itself, measured again."""
    found = replace(read_calibration(home / "scales"), codec="nvfp4")
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="nvfp4", calibration=found)))
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "same", Options(dtype="fp32", calibration=found)))
    again = measured(tmp_path / "same", SEEN)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    changed = 0
    for name, largest in again.maxima.items():
        assert float(stored[f"{name}.input_global_scale"]) == pytest.approx(2688 / float(largest.max()), rel=1e-4), (
            name
        )
        changed += not np.allclose(largest.max(), found.maxima[name].max(), rtol=1e-2)
    assert changed > 4


def test_what_is_excluded_stays_to_the_byte(home: Path, tmp_path: Path) -> None:
    options = Options(codec="int4_group", exclude=("*.layers.0.*",), calibration=read_calibration(home / "scales"))
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", options))
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "hf", tmp_path / "q"))
    spared = [name for name in before if ".layers.0." in name]
    assert all(torch.equal(before[name], after[name]) for name in spared)
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(before[norm], after[norm])
    assert parity(tmp_path / "q", home / "mcore", codec="int4_group", calibration=options.calibration).proved


def test_scales_of_another_codec_or_model_are_refused(home: Path, tmp_path: Path) -> None:
    found = read_calibration(home / "scales")
    job = plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_tensor", calibration=found))
    assert {name for name, _ in job.plan.updates} == {name for name in job.tensors if name.endswith(".input_scale")}
    unscaled = replace(found, scales={}, codec=None)
    with pytest.raises(UsageError, match="the calibration has no scales of channels"):
        plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="int4_group", calibration=unscaled))
    name = "model.layers.1.input_layernorm.weight"
    for other in ({name: found.scales[name][:64]}, {name.replace("1", "7"): found.scales[name]}):
        with pytest.raises(UsageError, match="it is of another model|has a scale of"):
            options = Options(codec="int4_group", calibration=Calibration({}, {}, other, "int4_group"))
            plan_mcore_to_hf(home / "mcore", tmp_path / "q", options)


def test_what_changes_a_layer_is_left_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a table that has attention read the norm before the MLP. The layer itself shows it."""
    own = "self_attention.linear_qkv.layer_norm_weight"
    wrong = "pre_mlp_layernorm.weight" if "moe" in home.name else "mlp.linear_fc1.layer_norm_weight"
    monkeypatch.setattr(folds, "_behind", lambda norm: (folds._ATTENTION,) if norm in (own, wrong) else ())
    found = measured(home / "hf", SEEN[:4], "int4_group")
    (said,) = found.measured["unscaled"]
    assert said.startswith(f"`{wrong}` of layers 0-1 is not scaled: then a layer computes otherwise")
    assert {name.split(".")[-2] for name in found.scales} == {"input_layernorm", "v_proj", "up_proj"}


def test_a_family_without_such_a_place_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no channel of `gpt2` can be scaled for nvfp4"):
        measured(make("gpt2", tmp_path / "gpt2"), SEEN[:4, :12] % 60, "nvfp4")


def test_a_checkpoint_is_measured_as_its_folder_is_and_on_its_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_scales, "_STEPS", 4)
    data, mcore = tmp_path / "data.jsonl", str(tmp_path / "mcore")
    data.write_text("".join(json.dumps({"text": f"the {n} quick brown foxes jump over it"}) + "\n" for n in range(36)))
    run(plan_hf_to_mcore(LLAMA, tmp_path / "mcore", Options()))
    found = mbx.calibrate(LLAMA, str(data), tmp_path / "cal", codec="nvfp4")
    assert len(found.maxima) == 4 * 4 and found.scales and found.measured["rows"] == 1

    out = [str(tmp_path / name) for name in "ab"]
    export = ["convert", "mcore-to-hf", mcore, "--codec", "nvfp4", "-q", "--calibrate"]
    assert main([*export, str(data), out[0]]) == main([*export, str(tmp_path / "cal"), out[1]]) == 0
    first, second = (next(Path(name).glob("*.safetensors")) for name in out)
    assert first.read_bytes() == second.read_bytes()
    cal, third = str(tmp_path / "cal"), str(tmp_path / "c")
    assert main(["verify", "parity", out[0], mcore, "--codec", "nvfp4", "--calibrate", cal, "-q"]) == 0
    assert main([*export, str(data), third, "--dry-run"]) == 2, "it would have to measure"
    assert main(["convert", "mcore-to-hf", mcore, third, "--codec", "fp8_block", "--calibrate", str(data)]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_it_is_the_same_model_in_every_family(family: str, tmp_path: Path) -> None:
    """Gamma less one, biases, shared heads, latent attention, gates, router, relu², layers of several kinds.

    With powers of two for the scales, which round nothing: some of these models make much of a last bit.
    """
    hf, same = make(family, tmp_path / "hf"), tmp_path / "same"
    found = measured(hf, SEEN[:4, :12] % 60, "nvfp4")
    found = replace(found, scales={name: channel_scales._powers(len(scale)) for name, scale in found.scales.items()})
    run(plan_hf_to_mcore(hf, tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", same, Options(dtype="fp32", calibration=found)))
    assert len(found.scales) >= 4
    forward = next(leg for leg in parity(hf, same, forward=True).legs if leg.name == "forward")
    assert forward.status == "passed", forward


def test_matrices_that_a_codec_cannot_hold_are_the_reason_given(tmp_path: Path) -> None:
    """Not the norms before them: no channel was even tried."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"number {n} of several"}) + "\n" for n in range(60)))
    with pytest.raises(UnsupportedError, match="has a shape that the codec holds"):
        mbx.calibrate(LLAMA, str(data), codec="int4_group", length=64)
