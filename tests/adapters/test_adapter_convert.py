"""PEFT folder → Megatron adapter checkpoint → PEFT folder, with adapters that PEFT made, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from _peft_made import CASES, Made, adapt, same_files, weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converters.adapters.settings import parse_settings
from converters.adapters.sites import columns
from converters.errors import CoverageError, StorageError, UnsupportedError, UsageError
from converters.mcore.layout import Layout
from converters.rows.pack import Pack, Slot
from mbx.formats.adapter_folder import BESIDE, CONFIG, WEIGHTS, open_base
from mbx.formats.torch_dist import find_iteration
from mbx.run.adapters import plan_adapter_to_hf, plan_adapter_to_mcore
from mbx.run.job import Options, run
from mbx.torchfile.dcp import read_dcp


def to_mcore(made: Made, target: Path, *, tp: int = 1, ep: int = 1, fused: bool = False) -> Path:
    options = Options(layout=Layout(tp=tp, ep=ep, etp=tp if ep == 1 else 1))
    return run(plan_adapter_to_mcore(made.adapter, target, options, open_base(made.base), fused=fused)).target


def to_hf(made: Made, source: Path, target: Path) -> Path:
    return run(plan_adapter_to_hf(source, target, Options(), open_base(made.base))).target


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_same_folder(tmp_path: Path, name: str) -> None:
    made = adapt(name, tmp_path)
    for tp in (1, 2, 4):
        back = to_hf(made, to_mcore(made, tmp_path / f"mcore{tp}", tp=tp), tmp_path / f"back{tp}")
        assert same_files(made.adapter, back), tp


def test_experts_over_ranks_are_the_same_folder(tmp_path: Path) -> None:
    made = adapt("qwen3_moe", tmp_path)
    assert same_files(made.adapter, to_hf(made, to_mcore(made, tmp_path / "m", tp=2, ep=4), tmp_path / "back"))


def test_keys_are_those_of_megatron_bridge(tmp_path: Path) -> None:
    made = adapt("qwen3_moe", tmp_path)
    tensors = read_dcp(find_iteration(to_mcore(made, tmp_path / "m"))).tensors
    layers = "decoder.layers."
    assert {name: tensors[name].shape for name in tensors if "linear_in" in name} == {
        f"{layers}self_attention.linear_qkv.adapter.adapter_q.linear_in.weight": (4, 4, 32),
        f"{layers}self_attention.linear_qkv.adapter.adapter_k.linear_in.weight": (4, 4, 32),
        f"{layers}self_attention.linear_qkv.adapter.adapter_v.linear_in.weight": (4, 4, 32),
        f"{layers}self_attention.linear_proj.adapter.linear_in.weight": (4, 4, 128),
        f"{layers}mlp.experts.experts.linear_fc1.adapter.linear_in.weight": (4, 8, 4, 32),
        f"{layers}mlp.experts.experts.linear_fc2.adapter.linear_in.weight": (4, 8, 4, 16),
    }


def test_layers_that_differ_have_keys_of_their_own(tmp_path: Path) -> None:
    made = adapt("llama", tmp_path, target_modules=["o_proj"], layers_to_transform=[1, 2], rank_pattern={"2.*": 4})
    mcore = to_mcore(made, tmp_path / "m")
    assert {name.split(".")[2] for name in read_dcp(find_iteration(mcore)).tensors} == {"1", "2"}
    assert same_files(made.adapter, to_hf(made, mcore, tmp_path / "back"))


def shared_a(made: Made) -> None:
    """Give query, key and value of every layer, and gate and up, one A."""
    tensors = load_file(made.adapter / WEIGHTS)
    for key in tensors:
        for owner, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if f"{owner}.lora_A" in key:
                for other in others:
                    tensors[key.replace(owner, other)] = tensors[key].clone()
    save_file(tensors, made.adapter / WEIGHTS, {"format": "pt"})


def test_one_a_for_a_fused_linear(tmp_path: Path) -> None:
    made = adapt("llama", tmp_path)
    with pytest.raises(CoverageError, match=r"lora_A.weight` should repeat"):
        to_mcore(made, tmp_path / "refused", fused=True)
    shared_a(made)
    mcore = to_mcore(made, tmp_path / "fused", tp=2, fused=True)
    tensors = read_dcp(find_iteration(mcore)).tensors
    assert tensors["decoder.layers.self_attention.linear_qkv.adapter.linear_out.weight"].shape[2] == 4
    assert not any("adapter_q" in name for name in tensors)
    assert same_files(made.adapter, to_hf(made, mcore, tmp_path / "back"))


def test_a_checkpoint_without_pefts_files_is_described_anew(tmp_path: Path) -> None:
    """What Megatron-Bridge writes: rank and alpha in run_config.yaml, one A for query, key and value."""
    made = adapt("llama", tmp_path)
    shared_a(made)
    mcore = to_mcore(made, tmp_path / "m", fused=True)
    beside = mcore / "iter_0000000" / BESIDE
    for path in beside.iterdir():
        path.unlink()
    beside.rmdir()
    back = to_hf(made, mcore, tmp_path / "back")
    before, after = weights(made.adapter), weights(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((back / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, False)
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    (mcore / "iter_0000000" / "run_config.yaml").unlink()
    with pytest.raises(StorageError, match="alpha"):
        to_hf(made, mcore, tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "some"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_settings_that_change_the_model_are_refused(changes: dict[str, object], words: str) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "peft_version": "0.21.2"}
    assert parse_settings(plain).scale_of("model.layers.0.self_attn.q_proj", 4) == 2.0
    with pytest.raises(UnsupportedError, match=words):
        parse_settings({**plain, **changes})  # type: ignore[dict-item]


def test_patterns_are_matched_as_peft_does() -> None:
    settings = parse_settings(
        {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {r".*\.gate_up_proj": 32},
        }
    )
    assert settings.rank_of("model.layers.0.self_attn.q_proj") == 4
    assert settings.rank_of("model.layers.0.self_attn.seq_proj") == 8
    assert settings.scale_of("model.layers.0.mlp.experts.gate_up_proj", 16) == 8.0
    assert settings.scale_of("model.layers.0.self_attn.k_proj", 8) == 16 / math.sqrt(8)


def test_what_adapts_nothing_is_an_error(tmp_path: Path) -> None:
    made = adapt("qwen3", tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedError, match="lm_head"):
        to_mcore(made, tmp_path / "vocabulary")
    tensors = load_file(made.adapter / WEIGHTS)
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    for factor in "AB":
        tensors[key.format(9, factor)] = tensors[key.format(0, factor)].clone()
    save_file(tensors, made.adapter / WEIGHTS)
    with pytest.raises(CoverageError, match=r"layers\.9\.self_attn\.q_proj"):
        to_mcore(made, tmp_path / "unknown")
    del tensors[key.format(9, "A")]
    save_file(tensors, made.adapter / WEIGHTS)
    with pytest.raises(CoverageError, match="lora_A of the adapter is missing"):
        to_mcore(made, tmp_path / "half")
    with pytest.raises(UsageError, match="already"):
        plan_adapter_to_hf(made.adapter, tmp_path / "x", Options(), open_base(made.base))


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    made, other = adapt("llama", tmp_path / "a"), adapt("qwen3", tmp_path / "b")
    with pytest.raises(CoverageError, match="were expected"):
        to_mcore(Made(other.base, made.adapter, made.model), tmp_path / "m")


@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_columns_of_a_slot(groups: int, sizes: list[int], width: int, data: st.DataObject) -> None:
    pack = Pack(groups, tuple(sizes))
    matrix = torch.arange(pack.rows * width).reshape(pack.rows, width)
    column = data.draw(st.integers(0, width - 1))
    for slot in pack.slots():
        rows = [k * slot.stride + slot.start + j for k in range(slot.groups) for j in range(slot.size)]
        parts = columns(slot, width, column)
        found = [k * p.stride + p.start + j for p in parts for k in range(p.groups) for j in range(p.size)]
        assert matrix.reshape(-1)[found].tolist() == matrix[rows, column].tolist()
    assert columns(Slot.whole(3), 1, 0)[0].rows == 3


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["self_attn.q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 12]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["w1"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "model.layers.2.self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": []},
    ],
)
def test_targets_are_those_of_peft(config: dict[str, object]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = parse_settings({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})  # type: ignore[dict-item]
    oracle = LoraConfig(**config)  # type: ignore[arg-type]
    oracle.target_modules = config["target_modules"]
    layers = ("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.1.w1")
    for module in ("lm_head", *(f"model.layers.{layer}.{name}" for layer in (0, 1, 2, 12) for name in layers)):
        assert settings.is_target(module) == bool(check_target_module_exists(oracle, module)), module


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}, {"target_modules": ["proj"]}]
)
def test_tensors_that_peft_would_leave_out_are_an_error(tmp_path: Path, changes: dict[str, object]) -> None:
    """The merged weights would not be PEFT's."""
    made = adapt("llama", tmp_path, target_modules=["q_proj", "v_proj"])
    to_mcore(made, tmp_path / "fits")
    path = made.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CoverageError, match="no target by adapter_config"):
        to_mcore(made, tmp_path / "mcore")


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": math.nan}, {"alpha_pattern": {"q_proj": math.inf}}, {"layers_to_transform": ["1"]}]
)
def test_numbers_that_are_none_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes)).replace("alpha_pattern", "q_proj")):
        parse_settings({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes})  # type: ignore[dict-item]
