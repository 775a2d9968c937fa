"""Folders whose index and shards disagree, and still are whole: what is read, and what an export makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fixtures.make_tiny import make
from mbx.formats.hf import INDEX
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "source", shards=2)


def tensors(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def there_and_back(source: Path, work: Path) -> Path:
    run(plan_hf_to_mcore(source, work / "mcore", Options()))
    run(plan_mcore_to_hf(work / "mcore", work / "back", Options()))
    return work / "back"


def loaded(folder: Path) -> Tensors:
    """What Transformers reads, which takes the index for the authority."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_overlay_counts_and_the_stale_copy_is_not_exported(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    name = next(name for name in index["weight_map"] if name.endswith("0.self_attn.o_proj.weight"))
    new = tensors(source)[name] + 1
    save_file({name: new}, source / "model-overlay.safetensors", {"format": "pt"})
    index["weight_map"][name] = "model-overlay.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    job = plan_hf_to_mcore(source, tmp_path / "plan", Options())
    assert any(f"`{name}`: the copy in" in note for note in job.plan.notes)
    back = there_and_back(source, tmp_path)
    assert torch.equal(tensors(back)[name], new) and equal(loaded(back), loaded(source))
    holders = [file.name for file in back.glob("*.safetensors") if name in load_file(file)]
    assert holders == ["model-overlay.safetensors"]


def test_an_index_of_another_cutting_is_made_anew(source: Path, tmp_path: Path) -> None:
    whole = tensors(source)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {name: file.replace("00002", "00003") for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    back = there_and_back(source, tmp_path)
    made = json.loads((back / INDEX).read_text())["weight_map"]
    assert set(made.values()) == {file.name for file in back.glob("*.safetensors")} and len(set(made.values())) == 2
    assert equal(tensors(back), whole) and loaded(back).keys() >= whole.keys()
