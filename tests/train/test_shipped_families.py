"""Shipped recipes beyond Llama and Qwen3: planned on the real config, and trained on the family's tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _trainings import ROOT

from converters.errors import UnsupportedError
from fixtures.make_tiny import make
from mbx.cli import main
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.state import latest
from mbx.train.recipe.catalogue import load_recipe, recipe_names
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare
from tests.judge import load_torch_dist
from tests.oracles import compare_logits, hf_logits, mcore_logits

#: Recipe's model, the real one, its tiny checkpoint, and what a CPU needs changed.
MODELS = {
    "qwen3_30b_a3b": ("Qwen3-30B-A3B", "qwen3_moe"),
    "deepseek_v2_lite": ("DeepSeek-V2-Lite", "deepseek_v2_lite"),
    "gemma3_1b": ("gemma-3-1b-pt", "gemma3_text"),
    "gpt_oss_20b": ("gpt-oss-20b", "gpt_oss"),
    "nemotron_h_8b": ("Nemotron-H-8B-Base-8K", "nemotron_h"),
}
#: Families that Megatron Core trains without a GPU.
ON_CPU = ("qwen3_30b_a3b", "deepseek_v2_lite", "gemma3_1b")
SMALL = ["data.kind=pattern", "data.length=32", "train.global_batch=4", "train.micro_batch=2", "train.precision=fp32"]


def shipped(models: tuple[str, ...]) -> list[str]:
    return [name for name in recipe_names() if name.rpartition("_")[0] in models]


@pytest.mark.parametrize("name", shipped(tuple(MODELS)))
def test_planned_on_the_real_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run outside torchrun prints the plan for the world that the recipe asks for."""
    config = json.loads((ROOT / "fixtures" / "index" / f"{MODELS[name.rpartition('_')[0]][0]}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config["config"]))
    arguments = [f"model={tmp_path}", "data.kind=pattern", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "--recipe", name, *arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    recipe = load_recipe(name)
    assert plan["world_size"] == max(recipe.parallel.tp, recipe.parallel.ep)
    if "memory_unknown" in plan:
        pytest.skip(plan["memory_unknown"])
    assert 1 << 30 < plan["memory_total_bytes"] < 130 << 30  # on an H200
    assert bool(plan["adapters"]) == bool(recipe.lora.rank)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {model: make(family, root / family) for model, (_, family) in MODELS.items()}


def every(model: str) -> list[object]:
    """Every model that trains here; `make train-matrix` has their families as well, so that one will do by default."""
    return [one if one == model else pytest.param(one, marks=pytest.mark.slow) for one in ON_CPU]


@pytest.mark.parametrize("model", every("gemma3_1b"))
def test_trained_and_exported(model: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The export's logits in Transformers are those of the run's checkpoint in Megatron Core, and not the source's."""
    overrides = [*SMALL, f"model={folders[model]}", "steps=4", "lr=1e-2", f"run.dir={tmp_path / 'run'}"]
    overrides += ["parallel.tp=1", "parallel.ep=1"]
    prepared = prepare(load_recipe(f"{model}_sft", overrides))
    assert len(train(prepared, live=False).losses) == 4
    target, _ = export_run(tmp_path / "run", tmp_path / "hf")
    found = latest(tmp_path / "run")
    assert found is not None
    ids = torch.randint(0, 251, (2, 24), generator=torch.Generator().manual_seed(1))
    with megatron_on_cpu(), process_group():
        network = build_model(prepared.plan.config, padded_vocab_size=prepared.plan.padded_vocab)
        load_torch_dist(network, found)
        trained = mcore_logits(network, ids, vocab_size=251)
    assert compare_logits(hf_logits(target, ids), trained).ok
    assert not compare_logits(hf_logits(folders[model], ids), trained).ok, "training must have changed something"


@pytest.mark.parametrize("model", every("deepseek_v2_lite"))
def test_adapters_of_shipped_recipes(model: str, folders: dict[str, Path], tmp_path: Path) -> None:
    overrides = [*SMALL, f"model={folders[model]}", "steps=2", "lr=1e-2", f"run.dir={tmp_path / 'run'}"]
    train(prepare(load_recipe(f"{model}_lora", [*overrides, "parallel.ep=1"])), live=False)
    adapter, kind = export_run(tmp_path / "run", tmp_path / "adapter")
    assert kind == "PEFT adapter"
    targets = set(json.loads((adapter / "adapter_config.json").read_text())["target_modules"])
    wanted = {"q_proj", "kv_b_proj"} if model == "deepseek_v2_lite" else {"q_proj", "k_proj", "v_proj"}
    assert wanted <= targets


def test_where_only_a_gpu_trains_it_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    overrides = [*SMALL, f"model={folders['nemotron_h_8b']}", f"run.dir={tmp_path / 'run'}", "parallel.tp=1"]
    with pytest.raises(UnsupportedError, match="Transformer Engine only"):
        train(prepare(load_recipe("nemotron_h_8b_sft", overrides)), live=False)
