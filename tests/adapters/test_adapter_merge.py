"""Merging gives PEFT's own values bit by bit, on every way between the two kinds of model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from _peft_made import CASES, Made, adapt, weights
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError, UnsupportedError
from converters.mcore.layout import Layout
from mbx.formats.adapter_folder import WEIGHTS, open_base
from mbx.run.adapters import plan_adapter_to_mcore
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.merge import plan_merge


def merged_by_peft(made: Made, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`merge_and_unload` of an fp32 model, then one cast, as Transformers saves it."""
    base = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, made.adapter).merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    merged.save_pretrained(folder)
    return weights(folder)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_peft(tmp_path: Path, name: str) -> None:
    made = adapt(name, tmp_path)
    run(plan_merge(made.base, made.adapter, tmp_path / "merged", Options()))
    expected, got = merged_by_peft(made, tmp_path / "peft-merged", torch.bfloat16), weights(tmp_path / "merged")
    before = weights(made.base)
    assert got.keys() == before.keys()
    shared = expected.keys() & got.keys()
    assert shared and all(torch.equal(got[key], expected[key].to(got[key].dtype)) for key in shared)
    assert any(not torch.equal(got[key], before[key]) for key in shared)


def test_a_negative_control(tmp_path: Path) -> None:
    """With gate's and up's A exchanged, or another alpha, the values are not PEFT's."""
    made = adapt("llama", tmp_path)
    expected = merged_by_peft(made, tmp_path / "peft-merged", torch.bfloat16)
    tensors = load_file(made.adapter / WEIGHTS)
    swapped = {
        key: tensors[key.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")]
        for key in tensors
        if "lora_A" in key
    }
    save_file(tensors | swapped, made.adapter / WEIGHTS)
    run(plan_merge(made.base, made.adapter, tmp_path / "swapped", Options()))
    wrong = [key for key, value in weights(tmp_path / "swapped").items() if not torch.equal(value, expected[key])]
    assert wrong and all("gate_proj" in key or "up_proj" in key for key in wrong)
    save_file(tensors, made.adapter / WEIGHTS)
    config = made.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    run(plan_merge(made.base, made.adapter, tmp_path / "scaled", Options()))
    assert not equal(weights(tmp_path / "scaled"), expected)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_every_way_gives_the_same_weights(tmp_path: Path, name: str) -> None:
    made = adapt(name, tmp_path)
    cut = Options(layout=Layout(tp=2))
    run(plan_merge(made.base, made.adapter, tmp_path / "hf", Options()))
    run(plan_merge(made.base, made.adapter, tmp_path / "mcore", cut, to="mcore"))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "mcore-hf", Options()))
    run(plan_hf_to_mcore(made.base, tmp_path / "base-mcore", Options()))
    run(plan_merge(tmp_path / "base-mcore", made.adapter, tmp_path / "from-mcore", Options(), to="hf"))
    run(plan_merge(tmp_path / "base-mcore", made.adapter, tmp_path / "mcore2", cut))
    run(plan_mcore_to_hf(tmp_path / "mcore2", tmp_path / "mcore2-hf", Options()))
    run(plan_adapter_to_mcore(made.adapter, tmp_path / "adapter", cut, open_base(made.base)))
    run(plan_merge(made.base, tmp_path / "adapter", tmp_path / "by-mcore", Options()))
    merged = weights(tmp_path / "hf")
    for way in ("mcore-hf", "from-mcore", "mcore2-hf", "by-mcore"):
        assert equal(weights(tmp_path / way), merged), way


def test_pieces_of_any_size_give_the_same_weights(tmp_path: Path) -> None:
    made = adapt("llama", tmp_path)
    run(plan_merge(made.base, made.adapter, tmp_path / "large", Options(workers=1)))
    run(plan_merge(made.base, made.adapter, tmp_path / "small", Options(workers=2, max_memory=1 << 16)))
    assert equal(weights(tmp_path / "small"), weights(tmp_path / "large"))


def test_whole_tensors_of_the_adapter_replace_the_bases(tmp_path: Path) -> None:
    made = adapt("llama", tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensors = load_file(made.adapter / WEIGHTS)
    head = tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, made.adapter / WEIGHTS)
    run(plan_merge(made.base, made.adapter, tmp_path / "merged", Options()))
    got = weights(tmp_path / "merged")
    assert torch.equal(got["lm_head.weight"], head.to(torch.bfloat16))
    assert torch.equal(got["model.norm.weight"], weights(made.base)["model.norm.weight"])
    run(plan_merge(made.base, made.adapter, tmp_path / "mcore", Options(), to="mcore"))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options()))
    assert equal(weights(tmp_path / "back"), got)
    with pytest.raises(UnsupportedError, match="lm_head"):
        plan_adapter_to_mcore(made.adapter, tmp_path / "a", Options(), open_base(made.base))


def test_an_adapted_head_is_merged_into_the_copy_that_peft_saves(tmp_path: Path) -> None:
    made = adapt("qwen3", tmp_path, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(made.adapter / WEIGHTS)
    run(plan_merge(made.base, made.adapter, tmp_path / "merged", Options()))
    expected = merged_by_peft(made, tmp_path / "peft-merged", torch.bfloat16)
    assert equal(weights(tmp_path / "merged"), expected)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    made, other = adapt("llama", tmp_path / "a"), adapt("qwen3", tmp_path / "b")
    with pytest.raises(CoverageError):
        plan_merge(other.base, made.adapter, tmp_path / "m", Options())
    assert not (tmp_path / "m").exists()
