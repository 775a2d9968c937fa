"""The two forms of a model on the disk: converted, resharded, verified and exported alike, and planted faults seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from converters.errors import CoverageError, MbxError, UnsupportedError, UsageError
from converters.mcore.hybrid_form import to_hybrid
from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.registry import open_megatron
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.torchfile.dcp import read_dcp
from tests.formats._runs import tree
from tests.parity._stores import read_mcore, write_mcore

#: A dense model, one of experts, one that mixes both and has a prediction head.
FAMILIES = ("mistral", "qwen3_moe", "glm4_moe")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY/{hf,gpt,hybrid}: the same model three times."""
    root = tmp_path_factory.mktemp("classes")
    for family in FAMILIES:
        source = make(family, root / family / "hf")
        layout = Layout(tp=2, pp=2, ep=2 if "moe" in family else 1)
        run(plan_hf_to_mcore(source, root / family / "gpt", Options(sync=False)))
        options = Options(sync=False, layout=layout, model_class="hybrid")
        run(plan_hf_to_mcore(source, root / family / "hybrid", options))
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_forms_verify_as_equal_and_export_the_same_files(made: Path, family: str, tmp_path: Path) -> None:
    here = made / family
    stored = read_dcp(here / "hybrid" / "iter_0000000").tensors
    assert "decoder.final_norm.weight" in stored and "decoder.final_layernorm.weight" not in stored
    assert all(name.split(".")[2].isdigit() for name in stored if name.startswith("decoder.layers."))
    opened = open_megatron(here / "hybrid")
    assert opened.model_class == "hybrid" and open_megatron(here / "gpt").model_class == "gpt"
    assert opened.tensors.keys() == open_megatron(here / "gpt").tensors.keys()
    # Megatron-Bridge's providers of these families build the GPTModel
    assert open_megatron(here / "gpt").run_config and opened.run_config is None
    for pair in (("gpt", "hybrid"), ("hybrid", "gpt"), ("hf", "hybrid"), ("hybrid", "hf")):
        report = parity(here / pair[0], here / pair[1])
        assert report.passed, [leg for leg in report.legs if leg.status != "passed"]
    run(plan_mcore_to_hf(here / "hybrid", tmp_path / "back", Options(sync=False)))
    run(plan_mcore_to_hf(here / "gpt", tmp_path / "other", Options(sync=False)))
    back, other = (tree(tmp_path / name) for name in ("back", "other"))
    assert back.pop("mbx_manifest.json") and other.pop("mbx_manifest.json") and back == other


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reshard_keeps_the_form_or_changes_it(made: Path, family: str, tmp_path: Path) -> None:
    here = made / family
    run(plan_mcore_to_mcore(here / "hybrid", tmp_path / "gpt", Options(sync=False, model_class="gpt")))
    run(plan_mcore_to_mcore(here / "hybrid", tmp_path / "kept", Options(sync=False)))
    run(plan_mcore_to_mcore(here / "gpt", tmp_path / "made", Options(sync=False, model_class="hybrid")))
    names = {name: set(read_dcp(tmp_path / name / "iter_0000000").tensors) for name in ("gpt", "kept", "made")}
    assert names["gpt"] == set(read_dcp(here / "gpt" / "iter_0000000").tensors)
    assert names["kept"] == names["made"] == set(read_dcp(here / "hybrid" / "iter_0000000").tensors)
    args = {name: open_megatron(tmp_path / name).args or {} for name in ("gpt", "made")}
    assert args["gpt"]["num_layers"] == args["made"]["num_layers"]  # a hybrid's are given back as the GPTModel's
    for name in names:
        assert parity(here / "hf", tmp_path / name).passed


def test_the_args_of_a_hybrid_model_say_its_layers(made: Path) -> None:
    for family, pattern in (("mistral", "*-*-"), ("qwen3_moe", "*E*E*E*E")):
        common = torch.load(made / family / "hybrid" / "iter_0000000" / "common.pt", weights_only=False)
        args = vars(common["args"])
        assert (args["hybrid_layer_pattern"], args["is_hybrid_model"]) == (pattern, True)
        assert args["num_layers"] == len(pattern) and args["hybrid_override_pattern"] is None


def test_an_optimizer_follows(made: Path, tmp_path: Path) -> None:
    """Moments in the space of the weights: under hybrid keys and back, byte for byte."""
    weights = read_mcore(made / "qwen3_moe" / "gpt")
    states = {
        f"optimizer.state.{kind}.{name}": torch.randn(tensor.shape, generator=torch.Generator().manual_seed(at))
        for at, (name, tensor) in enumerate(weights.items())
        for kind in ("exp_avg", "exp_avg_sq", "fp32_param")
    }
    run_dir = write_mcore({**weights, **states}, tmp_path / "run", open_megatron(made / "qwen3_moe" / "gpt").hf)
    common = {
        "args": argparse.Namespace(),
        "optimizer": {"optimizer": {"param_groups": [{"step": 3}]}},
        "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
    }
    torch.save(common, run_dir / "iter_0000000" / "common.pt")
    options = Options(sync=False, model_class="hybrid", layout=Layout(tp=2))
    run(plan_mcore_to_mcore(run_dir, tmp_path / "hybrid", options, with_optimizer=True))
    names = set(read_dcp(tmp_path / "hybrid" / "iter_0000000").tensors)
    assert "optimizer.state.exp_avg.decoder.final_norm.weight" in names
    assert "optimizer.state.exp_avg_sq.decoder.layers.7.mlp.experts.experts.linear_fc1.weight" in names
    assert len(names) == 4 * sum(1 for name in names if not name.startswith("optimizer."))
    back = Options(sync=False, model_class="gpt")
    run(plan_mcore_to_mcore(tmp_path / "hybrid", tmp_path / "back", back, with_optimizer=True))
    opened = open_megatron(tmp_path / "back")
    assert opened.state.keys() == states.keys()
    for name, tensor in states.items():
        whole = opened.state[name]
        raw = b"".join(_bytes(opened, chunk) for chunk in whole.chunks)
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(tensor.shape), tensor)


def _bytes(opened: object, chunk: object) -> bytes:
    source = opened.source  # type: ignore[attr-defined]
    size = 4 * int(torch.tensor(chunk.sizes).prod())  # type: ignore[attr-defined]
    data = bytearray(size)
    source.read_into(chunk.file, source.data_start(chunk), memoryview(data))  # type: ignore[attr-defined]
    return bytes(data)


def hybrid_tensors(made: Path, family: str) -> dict[str, torch.Tensor]:
    """The tensors of a hybrid checkpoint by their stored names."""
    out = {}
    for name, tensor in read_mcore(made / family / "gpt").items():
        if name.startswith("decoder.layers.") and not name.split(".")[2].isdigit():
            out |= {to_hybrid(name, (layer,))[0]: tensor[layer] for layer in range(tensor.shape[0])}
        else:
            out[to_hybrid(name, ())[0]] = tensor
    return out


def test_a_pattern_that_is_shifted_by_one_fails(made: Path, tmp_path: Path) -> None:
    """Attention and MLP each a position too far: an error or a failed leg, whoever reads it."""
    good = hybrid_tensors(made, "mistral")
    hf = open_megatron(made / "mistral" / "gpt").hf
    assert parity(made / "mistral" / "hf", write_mcore(good, tmp_path / "good", hf)).passed
    shifted = {
        name if (parts := name.split("."))[:2] != ["decoder", "layers"]
        else ".".join([*parts[:2], str(int(parts[2]) + 1), *parts[3:]]): tensor
        for name, tensor in good.items()
    }  # fmt: skip
    wrong = write_mcore(shifted, tmp_path / "wrong", hf)
    for other in ("hf", "gpt", "hybrid"):
        assert not parity(made / "mistral" / other, wrong).passed
    with pytest.raises(CoverageError):
        plan_mcore_to_hf(wrong, tmp_path / "back", Options())


def test_layers_in_another_order_fail(made: Path, tmp_path: Path) -> None:
    """The second layer's halves where the first one's are: by turns, and wrong."""
    good = hybrid_tensors(made, "mistral")
    swapped = {
        name if (parts := name.split("."))[:2] != ["decoder", "layers"]
        else ".".join([*parts[:2], str((int(parts[2]) + 2) % 4), *parts[3:]]): tensor
        for name, tensor in good.items()
    }  # fmt: skip
    wrong = write_mcore(swapped, tmp_path / "wrong", open_megatron(made / "mistral" / "gpt").hf)
    report = parity(made / "mistral" / "hybrid", wrong)
    assert {leg.name: leg.status for leg in report.legs}["weights"] == "failed"


def test_a_head_under_the_other_class_s_name_is_an_error(made: Path, tmp_path: Path) -> None:
    good = hybrid_tensors(made, "glm4_moe")
    assert any(".mtp_model_layer.layers." in name for name in good)
    renamed = {name.replace("mtp_model_layer.layers.0", "transformer_layer"): t for name, t in good.items()}
    wrong = write_mcore(renamed, tmp_path / "wrong", open_megatron(made / "glm4_moe" / "gpt").hf)
    with pytest.raises(MbxError, match=r"mtp_model_layer\.layers\.N"):
        open_megatron(wrong)


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "nemotron_h"])
def test_what_has_no_other_form_says_so(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "hf")
    asked = "gpt" if family == "nemotron_h" else "hybrid"
    with pytest.raises(UnsupportedError, match=f"`model_class` {asked}"):
        plan_hf_to_mcore(source, tmp_path / "mcore", Options(model_class=asked))
    if family == "nemotron_h":
        assert plan_hf_to_mcore(source, tmp_path / "mcore", Options(model_class="hybrid")).plan.drafts


def test_other_classes_and_formats_are_refused(made: Path, tmp_path: Path) -> None:
    source = made / "mistral" / "hf"
    with pytest.raises(UsageError, match="is not known"):
        plan_hf_to_mcore(source, tmp_path / "mcore", Options(model_class="mamba"))
    for format in ("torch", "fsdp_dtensor"):
        with pytest.raises(UnsupportedError, match="torch_dist only"):
            plan_hf_to_mcore(source, tmp_path / "mcore", Options(model_class="hybrid", format=format))
    json.dumps(open_megatron(made / "mistral" / "hybrid").args)  # plain values
