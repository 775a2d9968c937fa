"""The budget's parameter counts are those of models that Megatron Core builds; its parts follow the recipe."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _trainings import ROOT, raw

from converters.errors import UnsupportedError
from fixtures.index import load_index, published_parameters
from fixtures.make_tiny import make, tiny_config
from mbx.cli.train_plan import _word_on_fp8 as word_on_fp8
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.budget.counts import count
from mbx.train.budget.predict import Budget, predict, suggestions
from mbx.train.budget.shape import shape_of
from mbx.train.lora import attach as lora
from mbx.train.model.blueprint import Blueprint, blueprint
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.sections import Recipe
from mbx.train.run.memory import explain

GOLDEN = ROOT / "fixtures" / "golden" / "mcore"
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


@pytest.mark.parametrize(
    ("family", "lora_targets"),
    [
        ("qwen3_moe", ["linear_qkv", "linear_proj"]),
        ("qwen3_moe", ["linear_qkv", "linear_fc1", "linear_fc2"]),
        ("deepseek_v2_lite", ["linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]),
        ("deepseek_v2", []),
        ("deepseek_v2", ["linear_q_down_proj", "linear_q_up_proj", "linear_fc1", "linear_fc2"]),
        ("gemma3_text", ["all-linear"]),
        ("gpt_oss", ["linear_qkv", "linear_proj"]),
        ("mimo_v2_flash", ["all-linear"]),
        ("step_3_5_flash", []),
        ("gemma4_31b", []),
        ("gemma4_e2b", []),
        ("gemma4_26b", []),
    ],
)
def test_counts_of_other_families_are_exact(family: str, lora_targets: list[str], tmp_path: Path) -> None:
    adapted = {"rank": 4, "targets": lora_targets} if lora_targets else {}
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": str(make(family, tmp_path / family))}, lora=adapted))
    plan = blueprint(recipe)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config, padded_vocab_size=plan.padded_vocab)
        built = sum(p.numel() for p in model.parameters())
        if adapted:
            lora.attach(model, recipe.lora, plan, 0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = count(recipe, plan, 0)
    assert counts.base == built
    assert counts.adapters == (trained if adapted else 0)
    assert predict(recipe, plan, 1).total > counts.base


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("qwen3_30b_a3b", "Qwen3-30B-A3B"),
        ("deepseek_v2_lite", "DeepSeek-V2-Lite"),
        ("gemma3_1b", "gemma-3-1b-pt"),
        ("gpt_oss_20b", "gpt-oss-20b"),
        ("llama3_70b", "Llama-3.3-70B-Instruct"),
        ("nemotron_h_8b", "Nemotron-H-8B-Base-8K"),
        ("nemotron3_nano_30b_a3b", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        ("moonlight_16b_a3b", "Moonlight-16B-A3B"),
        ("ministral3_8b", "Ministral-3-8B-Base-2512"),
        ("qwen3_next_80b_a3b", "Qwen3-Next-80B-A3B-Instruct"),
        ("llama4_scout", "Llama-4-Scout-17B-16E-Instruct"),
        ("glm45_air", "GLM-4.5-Air"),
    ],
)
def test_counts_are_the_published_ones(recipe: str, model: str) -> None:
    """Those of the model's own tensors, but for prediction layers and the routers' biases, which are buffers."""
    chosen = load_recipe(f"{recipe}_lora", ["parallel.tp=1", "parallel.pp=1", "parallel.ep=1"])
    plan = blueprint(chosen)
    found = count(chosen, plan, 0).base
    if model == "gpt-oss-20b":  # experts in four bits, whose bytes are no elements
        assert found == published_parameters(model)
        return
    beyond = ("mtp.", f"model.layers.{plan.config['num_layers']}.")
    index = load_index(model)[1]
    kept = [name for name in index if not name.startswith(beyond)]
    assert found == sum(math.prod(index[name][1]) for name in kept if "correction_bias" not in name)


def test_an_expert_s_optimizer_is_shared_by_its_own_ranks() -> None:
    """With ep 8 on 8 GPUs every expert has one rank: nothing of its optimizer state is cut."""
    recipe = load_recipe("qwen3_30b_a3b_sft")
    plan = blueprint(recipe)
    counts = count(recipe, plan, 0)
    on_8, on_16 = (predict(recipe, plan, dp).parts["optimizer"] for dp in (8, 16))
    assert on_8 == 12 * counts.experts + 12 * (counts.base - counts.experts) // 8
    assert on_16 == on_8 // 2


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


def test_the_peak_is_one_phase_not_their_sum() -> None:
    """With recomputation the logits are gone before a layer is computed again; without them a layer weighs more."""

    def found(*overrides: str, name: str = "llama32_1b_lora") -> Budget:
        recipe = load_recipe(name, overrides)
        return predict(recipe, blueprint(recipe), 1)

    large = found("train.recompute=full", "data.length=8192", "train.micro_batch=1")
    assert large.phase == "the output layer" and large.parts["logits"] == 8192 * 128256 * 2
    assert "gradients within a layer" not in large.parts
    small = found(
        "train.recompute=full", "data.length=8192", "train.micro_batch=1", "model.config.model.vocab_size=1024"
    )
    assert small.phase == "a layer" and "logits" not in small.parts
    trained = found("train.micro_batch=1", name="llama32_1b_pretrain")
    assert trained.parts["output layer"] >= 128256 * 2048 * 2, "the output weight's gradient lies beside the logits"


def test_facts_of_fp8_and_of_the_optimizers() -> None:
    """SGD keeps one fp32 buffer, Adam two; only delayed scaling keeps a cast copy of the attention's output."""

    def total(*overrides: str) -> int:
        recipe = load_recipe("llama32_1b_pretrain", ["train.micro_batch=1", "data.length=4096", *overrides])
        return predict(recipe, blueprint(recipe), 1).total

    recipe = load_recipe("llama32_1b_pretrain", [])
    weights = count(recipe, blueprint(recipe), 0).base
    assert total() - total("optim.optimizer=sgd") == 4 * weights
    assert total("fp8.recipe=delayed") - total("fp8.recipe=tensorwise") == 16 * 4096 * 2048


def test_an_interleaved_pipeline_keeps_more_chunks() -> None:
    """1F1B keeps pp - stage micro-batches; interleaved, (pp - stage - 1) · 2 + (vpp - 1) · pp + 1 chunks."""

    def kept(*overrides: str) -> int:
        more = ["train.micro_batch=1", "train.global_batch=8", "parallel.pp=2", *overrides]
        recipe = load_recipe("llama32_1b_pretrain", more)
        return predict(recipe, blueprint(recipe), 1).parts["activations"]

    assert kept("parallel.vpp=2") > kept()


def test_suggestions_save_what_they_say() -> None:
    recipe = load_recipe("llama3_8b_sft", ["train.micro_batch=2"])
    plan = blueprint(recipe)
    here = predict(recipe, plan, 1).total
    tips = dict(suggestions(recipe, plan, 1))
    half = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, micro_batch=1))
    assert tips["train.micro_batch=1"] == here - predict(half, plan, 1).total
    assert list(tips.values()) == sorted(tips.values(), reverse=True)


@pytest.mark.parametrize("family", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_counts_are_those_of_every_table(family: str, tmp_path: Path) -> None:
    """Against the tensors that an import writes, mixers and pattern layers included."""
    config = tiny_config(family)
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapters = {"lora": {"rank": 4, "alpha": 8}} if family == "minimax_m3" else {}  # which alone are trained of it
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": str(tmp_path)}, **adapters))
    if "index_topk" in config:
        with pytest.raises(UnsupportedError, match="does not teach the indexer"):
            blueprint(recipe)
        return
    plan = blueprint(recipe)
    if plan.table is not None and plan.table.unsupported:
        pytest.skip("not trained")
    if plan.config.get("model.attention_beside_mamba"):
        with pytest.raises(UnsupportedError, match="does not cover attention beside Mamba-2"):
            shape_of(plan.config)
        return
    # Where the config says so, the model has prediction layers; none has what chooses keys.
    stored, absent = 0, ("lightning_indexers.", *(() if shape_of(plan.config).ahead else ("mtp.",)))
    for line in (GOLDEN / f"{family}.txt").read_text().splitlines():
        name, shape, dtype = (*line.split(" ", 1)[:1], *line.split(" ", 1)[1].rpartition(" ")[::2])
        buffer = dtype == "object" or name.endswith(("expert_bias", "layer_scalar"))
        if not buffer and not name.startswith(absent):
            stored += math.prod(json.loads(shape))
    assert count(recipe, plan, 0).base == stored


def test_a_choice_of_keys_that_megatron_core_has_not_is_no_training(tmp_path: Path) -> None:
    """MiniMax-M3's text: as long as it chooses among no more keys than it takes, and by adapters alone."""
    config = tiny_config("minimax_m3")
    sizes = {"sparse_block_size": 16, "sparse_topk_blocks": 2}
    config["sparse_attention_config"] = {**config["sparse_attention_config"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def planned(length: int, **sections: object) -> Blueprint:
        asked = raw(tmp_path / "run", model={"path": str(tmp_path)}, **sections)
        return blueprint(parse_recipe({**asked, "data": {**asked["data"], "length": length}}))

    adapters = {"lora": {"rank": 4, "alpha": 8}}
    assert planned(32, **adapters).config["lightning_indexer_layers"] == [1, 2, 3]
    with pytest.raises(UnsupportedError, match="32 keys that it chooses"):
        planned(33, **adapters)
    with pytest.raises(UnsupportedError, match="adapters alone"):
        planned(32)


def test_models_it_does_not_cover_are_named() -> None:
    recipe, plan = planned("llama")
    odd = dataclasses.replace(plan, config={**plan.config, "experimental_attention_variant": "dsa"})
    with pytest.raises(UnsupportedError, match="dsa attention"):
        predict(recipe, odd, 1)


def test_a_gpu_that_is_full_is_told_where_nothing_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, plan = planned("llama")
    odd = dataclasses.replace(plan, config={**plan.config, "experimental_attention_variant": "dsa"})
    prepared: Any = SimpleNamespace(recipe=recipe, plan=odd, ranks=SimpleNamespace(dp=1), looks=None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 79 << 30)
    found = explain(prepared, RuntimeError("tried to allocate 2 GiB"))
    assert found.fact == "out of memory on a GPU of 80 GiB: 79.0 GiB were reached"
    assert [*found.details] == [
        "the budget does not cover dsa attention",
        "tried to allocate 2 GiB",
    ]


def test_a_plan_of_what_is_not_predicted_does_not_judge_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, plan = planned("llama")
    recipe = dataclasses.replace(recipe, fp8=dataclasses.replace(recipe.fp8, recipe="tensorwise"))
    prepared: Any = SimpleNamespace(recipe=recipe, plan=plan, ranks=SimpleNamespace(dp=1, local_rank=0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda rank: "NVIDIA H200")
    assert len(word_on_fp8(prepared)) == 1, "so small a model does not gain by it"
    prepared.plan = dataclasses.replace(plan, config={**plan.config, "experimental_attention_variant": "dsa"})
    assert word_on_fp8(prepared) == []
