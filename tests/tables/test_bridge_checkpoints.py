"""Checkpoints as Megatron-Bridge leaves them, without a hf/ folder: its run_config.yaml is read in its own terms.

`fixtures/bridge/run_configs.json` holds the `model` nodes that the providers of Megatron-Bridge 0.3.1 make of the tiny
families' configs, as far as they describe the model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from converters.errors import MbxError, UnsupportedError, UsageError
from converters.mcore.bridge_config import config_of_run_config
from fixtures.make_tiny import make
from mbx.formats.architecture import architecture_of
from mbx.formats.registry import open_megatron as open_any
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

ROOT = Path(__file__).resolve().parents[2]
NODES: dict[str, dict[str, Any]] = json.loads((ROOT / "fixtures/bridge/run_configs.json").read_text(encoding="utf-8"))
#: A run_config of gpt-oss lacks its YaRN settings, one of DeepSeek-V3 its prediction layers.
NEEDS_A_CONFIG = ("gpt_oss", "deepseek_v3")
PLAIN = Options(sync=False)


@dataclass(frozen=True)
class Made:
    hf: Path
    mcore: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny family, and its torch_dist checkpoint with Megatron-Bridge's sidecar in place of ours; made once."""
    root = tmp_path_factory.mktemp("bridge")

    @cache
    def build(name: str) -> Made:
        source, target = make(name, root / name / "hf"), root / name / "mcore"
        run(plan_hf_to_mcore(source, target, PLAIN))
        as_bridge_leaves_it(target, NODES[name])
        return Made(source, target)

    return build


def as_bridge_leaves_it(target: Path, node: dict[str, Any]) -> None:
    iteration = target / "iter_0000000"
    for folder in target.rglob("hf"):
        shutil.rmtree(folder)
    for manifest in target.rglob("mbx_manifest.json"):
        manifest.unlink()
    common = torch.load(iteration / "common.pt", weights_only=False)
    common.pop("args", None)
    torch.save(common, iteration / "common.pt")
    (iteration / "run_config.yaml").write_text(yaml.safe_dump({"model": node}), encoding="utf-8")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def unequal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    return [n for n in left if not torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8))]


@pytest.mark.parametrize("name", NODES)
def test_an_export_with_the_config_gives_every_tensor_back(made: Any, tmp_path: Path, name: str) -> None:
    it = made(name)
    run(plan_mcore_to_hf(it.mcore, tmp_path / "hf", PLAIN, hf_config=it.hf))
    source, back = weights(it.hf), weights(tmp_path / "hf")
    assert source.keys() == back.keys()
    assert unequal(source, back) == []


@pytest.mark.parametrize("name", [name for name in NODES if name not in NEEDS_A_CONFIG])
def test_an_export_needs_no_config(made: Any, tmp_path: Path, name: str) -> None:
    it = made(name)
    run(plan_mcore_to_hf(it.mcore, tmp_path / "hf", PLAIN))
    source, back = weights(it.hf), weights(tmp_path / "hf")
    # The copies of embedding and head that prediction layers and tied models hold are written by no exporter.
    assert all(n.endswith(("embed_tokens.weight", "head.weight")) for n in source.keys() - back.keys())
    assert not back.keys() - source.keys()
    assert unequal(back, source) == []


@pytest.mark.parametrize("name", NODES)
def test_the_config_leg_finds_both_alike(made: Any, name: str) -> None:
    findings = config_findings(made(name))
    # One of DeepSeek-V3 says that there are no prediction layers, and here there are.
    assert [f for f in findings if not (name == "deepseek_v3" and "mtp_num_layers" in f)] == []


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma2", "query_pre_attn_scalar", 64),
        ("gemma2", "window_size", [9, 0]),
        ("gemma3_text", "rotary_base", [10000, 500000]),
        ("nemotron", "rotary_percent", 1.0),
        ("nemotron_h", "mamba_state_dim", 32),
        ("deepseek_v2", "moe_router_topk", 1),
        ("llama_nemotron", "heterogeneous_layers_config_encoded_json", '{"block_configs": []}'),
    ],
)
def test_a_run_config_that_says_otherwise_is_found(
    made: Any, tmp_path: Path, name: str, field: str, value: object
) -> None:
    it = made(name)
    other = Path(shutil.copytree(it.mcore, tmp_path / "mcore"))
    node = {**NODES[name], field: value}
    (other / "iter_0000000" / "run_config.yaml").write_text(yaml.safe_dump({"model": node}), encoding="utf-8")
    assert config_findings(Made(it.hf, other))


def config_findings(it: Made) -> tuple[str, ...]:
    (leg,) = (leg for leg in parity(it.hf, it.mcore).legs if leg.name == "config")
    assert leg.status in ("passed", "failed")
    return leg.details


@pytest.mark.parametrize("mapping", [None, "gpt_oss"])
def test_what_a_run_config_leaves_out_is_asked_for(made: Any, tmp_path: Path, mapping: str | None) -> None:
    with pytest.raises(UnsupportedError) as error:
        plan_mcore_to_hf(made("gpt_oss").mcore, tmp_path / "hf", Options(sync=False, mapping=mapping))
    assert "‹hf-config›" in str(error.value.hint)
    assert "rope_scaling.factor" in "\n".join((error.value.fact, *error.value.details))


def test_a_query_rank_that_no_weight_has_does_not_count(tmp_path: Path) -> None:
    """Megatron-Bridge writes its provider's rank of 512 for DeepSeek-V2-Lite and Moonlight."""
    source, target = make("deepseek_v2_lite", tmp_path / "hf"), tmp_path / "mcore"
    job = plan_hf_to_mcore(source, target, PLAIN)
    run(job)
    groups = {f"moe_router_{key}": job.plan.config[f"moe_router_{key}"] for key in ("num_groups", "group_topk")}
    scaling = {"moe_router_topk_scaling_factor": job.plan.config["moe_router_topk_scaling_factor"]}
    as_bridge_leaves_it(target, {**NODES["deepseek_v2"], **groups, **scaling, "q_lora_rank": 512})
    for reference, says in ((None, "the weights count"), (source, "config.json counts")):
        back = plan_mcore_to_hf(target, tmp_path / f"back {says}", PLAIN, hf_config=reference)
        assert any("`q_lora_rank`" in note and says in note for note in back.plan.notes)
        run(back)
        found, expected = weights(back.target), weights(source)
        assert found.keys() == expected.keys()
        assert unequal(found, expected) == []


def test_wide_query_norms_tell_olmoe_from_qwen3_moe(made: Any) -> None:
    tables = {name: architecture_of(open_any(made(name).mcore)).table.name for name in ("olmoe", "qwen3_moe")}
    assert tables == {"olmoe": "olmoe", "qwen3_moe": "qwen3_moe"}


def test_layers_that_are_not_json_are_an_error() -> None:
    node = {**NODES["llama_nemotron"], "heterogeneous_layers_config_encoded_json": "{"}
    with pytest.raises(UsageError, match="heterogeneous_layers_config_encoded_json"):
        config_of_run_config({"model": node})


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next"])
def test_prediction_layers_that_the_source_had_not_are_exported(made: Any, tmp_path: Path, name: str) -> None:
    """Megatron-Bridge builds the layers that the config names, whether the source has weights for them or not."""
    it = made(name)
    layers = json.loads((it.hf / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    heads = ("mtp.", f"model.layers.{layers}.")
    bare = Path(shutil.copytree(it.hf, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*")))
    plain = {n: t for n, t in weights(it.hf).items() if not n.startswith(heads)}
    save_file(plain, bare / "model.safetensors", metadata={"format": "pt"})
    run(plan_mcore_to_hf(it.mcore, tmp_path / "hf", PLAIN, hf_config=bare))
    back = weights(tmp_path / "hf")
    assert unequal(back, weights(it.hf)) == []
    assert plain.keys() < back.keys()


def test_an_export_modelled_on_a_folder_with_prediction_layers_needs_none(made: Any, tmp_path: Path) -> None:
    it = made("glm4_moe")
    bare = make("glm4_moe", tmp_path / "bare", layout="v5")  # Transformers saves none
    run(plan_hf_to_mcore(bare, tmp_path / "mcore", PLAIN))
    as_bridge_leaves_it(tmp_path / "mcore", NODES["glm4_moe"])
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", PLAIN, hf_config=it.hf))
    with pytest.raises(MbxError):  # and torn ones are refused
        run(plan_mcore_to_hf(torn(it.mcore, tmp_path / "torn"), tmp_path / "none", PLAIN, hf_config=it.hf))
    layers = json.loads((it.hf / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    assert not [n for n in weights(tmp_path / "hf") if n.startswith(f"model.layers.{layers}.")]


def torn(mcore: Path, out: Path) -> Path:
    """A copy of a checkpoint whose metadata lacks one tensor of a prediction layer."""
    import pickle

    shutil.copytree(mcore, out)
    path = out / "iter_0000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["mtp.layers.0.enorm.weight"]
    keep = {i: s for i, s in metadata.storage_data.items() if i.fqn != "mtp.layers.0.enorm.weight"}
    metadata.storage_data.clear()
    metadata.storage_data.update(keep)
    path.write_bytes(pickle.dumps(metadata))
    return out
