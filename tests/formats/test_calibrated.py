"""Scales of inputs that a calibration fixed: by what hooks see, as compressed-tensors makes and reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _codec_models import MODELS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mbx
from converters.codecs.calibration import Calibration
from converters.codecs.fresh import FRESH
from converters.errors import StorageError, UsageError
from mbx.cli.calibrate import ScaledCodec
from mbx.cli.options import CodecChoice
from mbx.models.transformers.calibration import measure_inputs
from mbx.proof.parity import parity
from mbx.run import export_codec
from mbx.run.calibration_file import calibration_bytes, read_calibration
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import table_for

#: Products of two layers that are not both dense: of four experts; of a dense one, and one with a shared expert too.
PRODUCTS = {"qwen3_moe": 2 * (4 + 4 * 3), "deepseek_v3": 2 * 5 + 3 + 4 * 3 + 3}
CODECS = {"fp8_tensor": ".input_scale", "nvfp4": ".input_global_scale"}


def measured(folder: Path, ids: torch.Tensor, codec: str | None = None) -> Calibration:
    config = json.loads((folder / "config.json").read_text())
    table = table_for(config, None)
    return measure_inputs(folder, table, table.config.to_mcore(config), ids, codec=codec, rows_at_once=4)


def seen_by_hooks(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """|input| of each product of the whole model, [tokens, channels], by module; experts' by their definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    seen: dict[str, torch.Tensor] = {}

    def experts(name: str, module: Any, states: torch.Tensor, chosen: torch.Tensor) -> None:
        for number in range(len(module.down_proj)):
            there = states[(chosen == number).any(-1)]
            gate, up = (there @ module.gate_up_proj[number].T).chunk(2, -1)
            seen[f"{name}.{number}.gate_proj"] = there.abs()
            seen[f"{name}.{number}.down_proj"] = (torch.nn.functional.silu(gate) * up).abs()

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            module.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0].abs()))
        elif name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda own, given, name=name: experts(name, own, *given[:2]))
    with torch.no_grad():
        model(ids, use_cache=False)
    return {name: sizes.flatten(0, -2) for name, sizes in seen.items()}


@pytest.fixture(scope="module", params=MODELS)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hf`, its checkpoint `mcore` and what was measured, in `calibration.safetensors`."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().bfloat16().save_pretrained(home / "hf")
    run(plan_hf_to_mcore(home / "hf", home / "mcore", Options()))
    ids = torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))
    torch.save(ids, home / "ids.pt")
    (home / "calibration.safetensors").write_bytes(calibration_bytes(measured(home / "hf", ids)))
    return home


def test_what_is_measured_is_what_hooks_see(home: Path) -> None:
    found = read_calibration(home / "calibration.safetensors")
    wanted = seen_by_hooks(home / "hf", torch.load(home / "ids.pt"))
    shared = ("k_proj", "v_proj", "up_proj")  # the inputs of what stands before them
    assert found.maxima.keys() == {name for name in wanted if not name.endswith(shared)}
    for name, largest in found.maxima.items():
        assert np.allclose(largest, wanted[name].amax(0), rtol=1e-4, atol=1e-7), name
        assert np.allclose(found.means[name], wanted[name].mean(0), rtol=1e-4, atol=1e-7), name
        assert largest.max() > 0


@pytest.mark.parametrize("codec", CODECS)
def test_scales_of_inputs_are_stored_held_and_carried(home: Path, codec: str, tmp_path: Path) -> None:
    found = read_calibration(home / "calibration.safetensors")
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec=codec, calibration=found)))
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    inputs = said["config_groups"]["group_0"]["input_activations"]
    assert inputs["dynamic"] == {"fp8_tensor": False, "nvfp4": "local"}[codec]
    file = tmp_path / "q" / "model.safetensors"
    stored = load_file(file)
    products = [name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")]
    scales = [name for name in stored if name.endswith(CODECS[codec])]
    assert set(scales) == {name.removesuffix(".weight") + CODECS[codec] for name in products}
    family = json.loads((home / "hf" / "config.json").read_text())["model_type"]
    assert len(scales) == PRODUCTS.get(family, 2 * 7)

    assert parity(tmp_path / "q", home / "mcore", codec=codec, calibration=found).proved
    assert not parity(tmp_path / "q", home / "mcore", codec=codec).proved, "scales that such an export has not"
    run(plan_hf_to_mcore(tmp_path / "q", tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "again", Options(codec="same")))
    assert file.read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()

    stored[scales[3]] *= 1.5
    save_file(stored, file, metadata={"format": "pt"})
    report = parity(tmp_path / "q", home / "mcore", codec=codec, calibration=found)
    assert [difference.name for difference in report.differences] == [scales[3]]


@pytest.mark.parametrize("codec", CODECS)
def test_scales_are_those_of_compressed_tensors(home: Path, codec: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="it is not installed: `make codecs` brings it")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    found = read_calibration(home / "calibration.safetensors")
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec=codec, calibration=found)))
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    inputs = said["config_groups"]["group_0"]["input_activations"]
    args = QuantizationArgs(**{key: value for key, value in inputs.items() if value is not None})
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for name, largest in found.maxima.items():
        high = torch.tensor([largest.max()])
        theirs = calculate_qparams(-high, high, args)[0] if codec == "fp8_tensor" else generate_gparam(-high, high)
        assert torch.equal(theirs, stored[name + CODECS[codec]]), name


def test_a_folder_loads_in_transformers(home: Path, tmp_path: Path) -> None:
    """Its own loader, by compressed-tensors; what it computes is near what the unquantised model does."""
    pytest.importorskip("compressed_tensors", reason="it is not installed: `make codecs` brings it")
    found, ids = read_calibration(home / "calibration.safetensors"), torch.load(home / "ids.pt")
    run(plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_tensor", calibration=found)))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    # Transformers decodes fused experts, and has no place for the scales of their inputs
    assert all(".experts." in name and name.endswith(".input_scale") for name in report["unexpected_keys"])
    plain = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs, ours = model(ids).logits, plain(ids).logits
    assert 0 < (theirs - ours).norm() / ours.norm() < 0.2


def test_what_no_calibration_is_for_is_refused(home: Path, tmp_path: Path) -> None:
    found = read_calibration(home / "calibration.safetensors")
    with pytest.raises(UsageError, match="stores nothing that is calibrated"):
        plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_block", calibration=found))
    with pytest.raises(UsageError, match="`codec` plain: the calibration has no scales of channels"):
        plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(calibration=found))
    name = "model.layers.1.self_attn.o_proj"
    narrow = Calibration({name: found.maxima[name][:64]}, {})
    with pytest.raises(UsageError, match="measured 64 inputs"):
        plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_tensor", calibration=narrow))
    alone = Calibration({name: found.maxima[name]}, {})
    job = plan_mcore_to_hf(home / "mcore", tmp_path / "q", Options(codec="fp8_tensor", calibration=alone))
    assert len(job.plan.reencoded) == 1
    assert any("were not measured, and stay plain" in note for note in job.plan.notes)
    (tmp_path / "other.safetensors").write_bytes((home / "hf" / "model.safetensors").read_bytes())
    with pytest.raises(StorageError, match="is no calibration"):
        read_calibration(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said", "why"),
    [
        ({"a.max": torch.tensor([1.0, torch.nan])}, "{}", "no magnitudes"),
        ({"a.mean": torch.tensor([-1.0])}, "{}", "no magnitudes"),
        ({"a.scale": torch.tensor([0.0, 1.0])}, "{}", "no scales"),
        ({"a.max": torch.ones(2, dtype=torch.float64)}, "{}", "is no calibration"),
        ({"a.max": torch.ones(2, 2)}, "{}", "is no calibration"),
        ({"a.weight": torch.ones(2)}, "{}", "is no calibration"),
        ({"a.max": torch.ones(2)}, None, "is no calibration"),
        ({"a.max": torch.ones(2)}, "[" * 100_000, "not valid JSON"),
    ],
)
def test_a_strangers_file_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: str | None, why: str
) -> None:
    save_file(tensors, tmp_path / "cal", metadata=None if said is None else {"mbx_calibration": said})
    with pytest.raises(StorageError, match=why):
        read_calibration(tmp_path / "cal")


def test_the_docs_list_the_codecs_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "quantise-for-vllm.md").read_text()
    listed = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")]
    names = [name for cell in listed for name in cell]
    usable = [name for name, fresh in FRESH.items() if fresh.inputs is not None or fresh.scaled]
    assert names[: len(FRESH)] == list(FRESH) and sorted(names[len(FRESH) :]) == sorted(usable)
    scaled = [name for name, fresh in FRESH.items() if fresh.scaled]
    assert all(f"`{name}`" in (mbx.calibrate.__doc__ or "") for name in scaled)


def test_the_command_line_offers_the_codecs_that_there_are() -> None:
    """Its lists stand apart, so that asking for help imports none of them."""
    assert [choice.value for choice in CodecChoice] == list(export_codec.CODECS)
    assert [choice.value for choice in ScaledCodec] == [name for name, fresh in FRESH.items() if fresh.scaled]
