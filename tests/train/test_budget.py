"""The budget's parameter counts are those of models that Megatron Core builds; its parts follow the recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from _trainings import ROOT, raw

from converters.errors import UnsupportedError
from mbx.mcore.build import build_model
from mbx.mcore.cpu import megatron_on_cpu, process_group
from mbx.train import lora
from mbx.train.budget import count, predict, suggestions
from mbx.train.catalogue import load_recipe
from mbx.train.model import Blueprint, blueprint
from mbx.train.recipe import Recipe, parse_recipe

MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2}


def planned(family: str, **sections: dict[str, object]) -> tuple[Recipe, Blueprint]:
    model = {"path": str(ROOT / "fixtures" / "tiny" / family), **sections.pop("model", {})}
    recipe = parse_recipe(raw(Path("unused"), model=model, **sections))
    return recipe, blueprint(recipe)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "adapted", [{}, {"rank": 4}, {"rank": 4, "dora": True, "targets": ["linear_qkv", "linear_fc2"]}]
)
def test_counts_are_exact(family: str, adapted: dict[str, object]) -> None:
    recipe, plan = planned(family, lora=adapted)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config, padded_vocab_size=plan.padded_vocab)
        if adapted:
            lora.attach(model, recipe.lora, plan, 0)
        built = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = count(recipe, plan, 0)
    assert counts.base + counts.adapters == built
    assert (counts.adapters if adapted else counts.base) == trained


def test_experts_and_learned_positions() -> None:
    config: dict[str, object] = {"add_bias_linear": True, "normalization": "LayerNorm", "gated_linear_unit": False}
    config |= {"model.position_embedding_type": "learned_absolute", "activation_func": "gelu"}
    for changed in (MOE, config):
        recipe, plan = planned("llama", model={"config": changed})
        with megatron_on_cpu(), process_group():
            built = sum(p.numel() for p in build_model(plan.config).parameters())
        assert count(recipe, plan, 0).base == built


def test_stages_and_ranks_add_up() -> None:
    recipe, plan = planned("qwen3", model={"vocab_divisor": 64})
    whole = count(recipe, plan, 0)
    halved, half = planned("qwen3", model={"vocab_divisor": 32}, parallel={"tp": 2})
    assert 2 * count(halved, half, 0).linears == whole.linears
    staged, stage = planned("qwen3", model={"vocab_divisor": 64}, parallel={"pp": 2})
    assert sum(count(staged, stage, n).base for n in (0, 1)) == whole.base


def test_an_8b_adapter_has_168m_weights() -> None:
    recipe = load_recipe("llama3_8b_lora", ["lora.rank=64"])
    counts = count(recipe, blueprint(recipe), 0)
    assert counts.adapters == 167_772_160
    assert counts.base == 8_030_261_248


def test_parts_follow_the_recipe() -> None:
    def total(*overrides: str, name: str = "llama3_8b_sft") -> int:
        recipe = load_recipe(name, overrides)
        return predict(recipe, blueprint(recipe), 1).total

    base = total()
    assert total("train.recompute=full") < base
    assert total("parallel.tp=2") < 0.65 * base
    assert total("fp8.recipe=tensorwise") > base
    assert total("data.length=8192") > base
    assert total(name="llama3_8b_lora") < 0.4 * base


def test_suggestions_save_what_they_say() -> None:
    recipe = load_recipe("llama3_8b_sft", ["train.micro_batch=2"])
    plan = blueprint(recipe)
    here = predict(recipe, plan, 1).total
    tips = dict(suggestions(recipe, plan, 1))
    half = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, micro_batch=1))
    assert tips["train.micro_batch=1"] == here - predict(half, plan, 1).total
    assert list(tips.values()) == sorted(tips.values(), reverse=True)


def test_models_it_does_not_cover_are_named() -> None:
    recipe, plan = planned("llama")
    odd = dataclasses.replace(plan, config={**plan.config, "multi_latent_attention": True})
    with pytest.raises(UnsupportedError, match="standard attention"):
        predict(recipe, odd, 1)
