"""Recipes: every shipped one is whole, unknown keys are refused with near misses, overrides reach their field."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import StorageError, UsageError
from mbx.train.catalogue import load_recipe, recipe_names
from mbx.train.recipe import all_keys, check_world, parse_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_parse_and_plan(name: str) -> None:
    from mbx.train.model import blueprint

    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    plan = blueprint(recipe)
    assert plan.padded_vocab % recipe.parallel.tp == 0
    assert ("lora" in name or "dora" in name) == bool(recipe.lora.rank)


def test_shipped_shapes_are_those_of_the_hub() -> None:
    """Every shape that a stored config of a real model knows agrees with it, field by field."""
    import json

    from mbx.registry import table_for
    from mbx.train.catalogue import load_recipe

    index = Path(__file__).resolve().parents[2] / "fixtures" / "index"
    pairs = {
        "llama32_1b": "Llama-3.2-1B",
        "llama3_8b": "Llama-3.1-8B",
        "llama3_70b": "Llama-3.3-70B-Instruct",
        "qwen3_0_6b": "Qwen3-0.6B",
        "qwen3_8b": "Qwen3-8B",
    }
    for recipe, model in pairs.items():
        config = json.loads((index / f"{model}.json").read_text())["config"]
        wanted = {k: v for k, v in table_for(config).config.to_mcore(config).items() if v is not None}
        assert dict(load_recipe(f"{recipe}_sft").model.shape) == wanted


def test_overrides() -> None:
    recipe = load_recipe(
        "llama3_8b_lora",
        ["model=dir", "data=x.jsonl", "optim.lr=3e-5", "lora.targets=linear_qkv,linear_proj", "train.steps=70"]
        + ["model.config.hidden_dropout=0.1", "model.shape.model.vocab_size=64", "parallel.sequence_parallel=false"],
    )
    assert (recipe.model.path, recipe.data.path, recipe.optim.lr, recipe.train.steps) == ("dir", "x.jsonl", 3e-5, 70)
    assert recipe.lora.targets == ("linear_qkv", "linear_proj")
    assert recipe.model.config == {"hidden_dropout": 0.1}
    assert recipe.model.shape["model.vocab_size"] == 64
    assert not recipe.parallel.sequence_parallel
    assert load_recipe("llama3_8b_lora", ["run.dir=1"]).run.dir == "1"


@pytest.mark.parametrize(
    ("override", "fact", "hint"),
    [
        ("trian.steps=3", "trian.steps", "train.steps"),
        ("data.lenght=3", "data.lenght", "data.length"),
        ("train.steps=many", "type int", None),
        ("train.steps=true", "type int", None),
        ("train.steps=0", "at least 1", None),
        ("optim.lr=-1", "negative", None),
        ("optim.schedule=cosin", "choices", "cosine"),
        ("fp8.recipe=fp4", "choices", None),
        ("train=3", "no key `train`", "train"),
        ("steps", "no override", "key=value"),
        ("optim.warmup_steps=100000", "exceed", None),
    ],
)
def test_bad_overrides(override: str, fact: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("llama3_8b_sft", [override])
    assert fact in caught.value.fact
    assert hint is None or hint in (caught.value.hint or "")


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="no recipe") as caught:
        load_recipe("llama3_8b_sf")
    assert "llama3_8b_sft" in (caught.value.hint or "")
    with pytest.raises(StorageError):
        load_recipe("nowhere.toml")


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npath = "x"\n[train]\nsteps = 3\n')
    assert load_recipe(str(path)).train.steps == 3
    assert load_recipe(str(path)).name == "mine"
    path.write_text("[model\n")
    with pytest.raises(UsageError, match="mine"):
        load_recipe(str(path))
    path.write_text("[model]\npaht = 1\n")
    with pytest.raises(UsageError, match="paht"):
        load_recipe(str(path))


def test_every_key_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    missing = [key for key in all_keys() if f"`{key}`" not in text]
    assert not missing


def test_world_must_fit() -> None:
    recipe = parse_recipe({"parallel": {"tp": 2, "pp": 2}, "train": {"global_batch": 8, "micro_batch": 2}})
    assert check_world(recipe, 8) == 2
    with pytest.raises(UsageError, match="does not divide the world of 6"):
        check_world(recipe, 6)
    with pytest.raises(UsageError, match="global_batch"):
        check_world(recipe, 32)
