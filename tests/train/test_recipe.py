"""Recipes: every shipped one is whole, unknown keys are refused with near misses, overrides reach their field."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import StorageError, UsageError
from mbx.train.recipe.catalogue import load_recipe, recipe_names
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.toml import dump_toml
from mbx.train.recipe.world import check_world, smallest_world


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_parse_and_plan(name: str) -> None:
    from mbx.train.model.adapted import adapted, unloaded
    from mbx.train.model.blueprint import blueprint

    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    plan = blueprint(recipe)
    assert plan.padded_vocab % recipe.parallel.tp == 0
    assert ("lora" in name or "dora" in name) == bool(recipe.lora.rank)
    assert not recipe.lora.rank or not unloaded(adapted(recipe.lora, plan)), "PEFT loads what is trained"


def test_shipped_shapes_are_those_of_the_hub() -> None:
    """Every shape that a stored config of a real model knows agrees with it, field by field."""
    import json

    from mbx.tables import table_for
    from mbx.train.recipe.catalogue import load_recipe

    index = Path(__file__).resolve().parents[2] / "fixtures" / "index"
    pairs = {
        "llama32_1b": "Llama-3.2-1B",
        "llama3_8b": "Llama-3.1-8B",
        "llama3_70b": "Llama-3.3-70B-Instruct",
        "qwen3_0_6b": "Qwen3-0.6B",
        "qwen3_8b": "Qwen3-8B",
        "qwen3_30b_a3b": "Qwen3-30B-A3B",
        "deepseek_v2_lite": "DeepSeek-V2-Lite",
        "gemma3_1b": "gemma-3-1b-pt",
        "gpt_oss_20b": "gpt-oss-20b",
        "nemotron_h_8b": "Nemotron-H-8B-Base-8K",
        "qwen3_next_80b_a3b": "Qwen3-Next-80B-A3B-Instruct",
        "glm45_air": "GLM-4.5-Air",
        "moonlight_16b_a3b": "Moonlight-16B-A3B",
        "ministral3_8b": "Ministral-3-8B-Base-2512",
        "nemotron3_nano_30b_a3b": "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "llama4_scout": "Llama-4-Scout-17B-16E-Instruct",
    }
    for recipe, model in pairs.items():
        config = json.loads((index / f"{model}.json").read_text())["config"]
        table = table_for(config)
        wanted = {k: v for k, v in table.config.to_mcore(config).items() if v is not None and k != "mtp_num_layers"}
        wanted["mapping"] = table.name
        found = load_recipe(f"{recipe}_lora").model.shape
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == {
            k: tuple(v) if isinstance(v, list) else v for k, v in wanted.items()
        }


def test_models_list_the_methods_that_fit() -> None:
    names = set(recipe_names())
    assert {"nemotron_h_8b_sft", "deepseek_v2_lite_lora", "gpt_oss_20b_dora"} <= names
    assert "glm45_air_lora" in names and "glm45_air_sft" not in names
    # and what a method changes in a model: all weights of 70 billion need more GPUs than their adapters
    assert (load_recipe("llama3_70b_sft").parallel.pp, load_recipe("llama3_70b_lora").parallel.pp) == (4, 1)


@pytest.mark.parametrize("name", recipe_names())
def test_any_shipped_recipe_can_be_cut_short(name: str) -> None:
    from mbx.train.run.schedule import learning_rate

    recipe = load_recipe(name, ["steps=4"])
    assert learning_rate(recipe.optim, 0, 4) == recipe.optim.lr, "no warm-up swallows a run of four steps"


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
        ("optim.warmup_steps=100000", "exceed", "warmup_fraction"),
        ("optim.warmup_fraction=1.5", "0 to 1", None),
        ("parallel.vpp=2", "parallel.pp is 1", "parallel.pp=2"),
        ("optim.lr=nan", "finite", None),
        ("optim.lr=inf", "finite", None),
        ("optim.beta1=1", "below 1", None),
        ("optim.beta2=-1", "at least 0", None),
        ("optim.eps=-1", "negative", None),
        ("optim.clip=-1", "negative", None),
        ("optim.decay_steps=-1", "negative", None),
        ("optim.warmup_steps=-2", "at least -1", None),
        ("optim.min_lr=1", "above optim.lr", "optim.min_lr="),
        ("data.seed=-1", "0 to 2147483647", None),
        ("train.seed=99999999999999999999", "0 to 2147483647", None),
        ("train.eval_every=-1", "negative", None),
        ("train.eval_steps=0", "at least 1", None),
        ("train.spike_factor=-1", "negative", None),
        ("lora.alpha=nan", "finite", None),
        ("lora.dropout=1", "below 1", None),
        ("lora.adapter=dir", "trains every weight", "lora.rank="),
        ("lora.dora=true", "trains every weight", "lora.rank="),
        ("run.dir=", "empty", "run.dir="),
        ("data.eval_path=x.jsonl", "never read", "train.eval_every="),
    ],
)
def test_bad_overrides(override: str, fact: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("llama3_8b_sft", [override])
    assert fact in caught.value.fact
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("overrides", "fact"),
    [
        (["data.kind=mock", "data=x.jsonl"], "reads no file, got data.path=x.jsonl"),
        (["data.kind=pattern", "data=x.jsonl"], "reads no file"),
        (["data.kind=indexed", "data=x", "data.eval_path=y", "train.eval_every=1"], "takes no data.eval_path"),
        (["data.kind=indexed", "data=x", "data.split=abc"], "data.split"),
        (["data.kind=indexed", "data=x", "data.split=0,1,1"], "data.split"),
        (["lora.rank=4", "lora.alpha=0"], "by 0"),
        (["optim.muon_steps=9"], "optim.muon_steps is of Muon, and optim.optimizer is adam"),
        (
            ["optim.optimizer=sgd", "optim.muon_momentum=0.1"],
            "optim.muon_momentum is of Muon, and optim.optimizer is sgd",
        ),
    ],
)
def test_what_would_be_left_unread_is_refused(overrides: list[str], fact: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("llama3_8b_sft", overrides)
    assert fact in caught.value.fact


def test_values_at_the_ends_of_their_ranges_are_taken() -> None:
    edges = ["optim.beta1=0", "optim.clip=0", "optim.warmup_steps=-1", "train.seed=0", "data.kind=indexed", "data=x"]
    for split in ("969,30,1", "1", "9,1", "0.9,.1,0"):
        assert load_recipe("llama3_8b_sft", [*edges, f"data.split={split}"]).data.split == split


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
    path.write_text("model = 3\n")
    with pytest.raises(UsageError, match="`model` is a section"):
        load_recipe(str(path), ["model=x"])
    path.write_text("[model]\npaht = 1\n")
    with pytest.raises(UsageError, match="paht"):
        load_recipe(str(path))


def test_world_must_fit() -> None:
    recipe = parse_recipe({"parallel": {"tp": 2, "pp": 2}, "train": {"global_batch": 8, "micro_batch": 2}})
    assert check_world(recipe, 8) == 2
    with pytest.raises(UsageError, match="does not divide the world of 6"):
        check_world(recipe, 6)
    with pytest.raises(UsageError, match="global_batch") as caught:
        check_world(recipe, 32)
    assert caught.value.hint == "train.global_batch=16"


def test_the_smallest_world_holds_every_axis() -> None:
    experts = parse_recipe({"parallel": {"tp": 2, "ep": 8}, "train": {"global_batch": 8}})
    assert smallest_world(experts) == 8
    with pytest.raises(UsageError, match="ep 8") as caught:
        check_world(experts, 4)
    assert "--nproc-per-node 8" in (caught.value.hint or "")


def test_interleaved_stages_need_full_rounds() -> None:
    recipe = parse_recipe({"parallel": {"pp": 2, "vpp": 2}, "train": {"global_batch": 9}})
    with pytest.raises(UsageError, match="multiple of parallel.pp 2 micro-batches") as caught:
        check_world(recipe, 2)
    assert caught.value.hint == "train.global_batch=10"


def test_any_recipe_comes_back_from_its_toml(tmp_path: Path) -> None:
    said = 'a "b" \\ \n \x7f 🙂'
    recipe = load_recipe("llama32_1b_lora", ["name=mine", f"description={said}", "model.shape.model.x=1"])
    (tmp_path / "mine.toml").write_text(dump_toml(recipe.to_dict()), encoding="utf-8")
    again = load_recipe(str(tmp_path / "mine.toml"))
    assert again == recipe and again.description == said
