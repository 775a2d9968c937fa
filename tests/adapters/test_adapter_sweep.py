"""PEFT's settings, one after another, on ten families: a merge is PEFT's own on the loaded model, or refused by name.

Nobody chose these pairs: every family meets every setting. Merges are computed in fp32 by both and rounded once.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from _peft_made import EXPERTS, adapt, weights

from converters.errors import MbxError
from mbx.run.job import Options, run
from mbx.run.merge import plan_merge

#: Family → the names of one attention and one MLP linear.
FAMILIES: dict[str, tuple[str, str]] = {
    "llama": ("q_proj", "down_proj"),
    "qwen2": ("k_proj", "gate_proj"),
    "qwen3": ("v_proj", "up_proj"),
    "mistral": ("o_proj", "down_proj"),
    "gemma2": ("q_proj", "gate_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "qwen3_moe": ("q_proj", "o_proj"),
    "gpt_oss": ("q_proj", "v_proj"),
    "deepseek_v2": ("q_b_proj", "kv_b_proj"),
    "qwen3_5_text": ("q_proj", "down_proj"),
}
MOE = ("qwen3_moe", "gpt_oss")


def settings_of(family: str) -> dict[str, dict[str, object]]:
    """LoraConfig's settings by name."""
    one, two = FAMILIES[family]
    both: dict[str, object] = {"target_modules": [one, two]}
    found: dict[str, dict[str, object]] = {
        "plain": both,
        "all-linear": {"target_modules": "all-linear"},
        "expression": {"target_modules": rf".*layers\.[0-9]+\..*({one}|{two})"},
        "rank_pattern": {**both, "rank_pattern": {one: 2}},
        "alpha_pattern": {**both, "alpha_pattern": {rf".*\.{two}": 3}},
        "patterns of layers": {**both, "rank_pattern": {rf"layers\.1\..*{one}": 6}, "alpha_pattern": {two: 5}},
        "rsLoRA": {**both, "use_rslora": True},
        "DoRA": {**both, "use_dora": True},
        "DoRA and rsLoRA": {**both, "use_dora": True, "use_rslora": True},
        "bias": {**both, "bias": "all"},
        "bias of what is adapted": {**both, "bias": "lora_only"},
        "lora_bias": {**both, "lora_bias": True},
        "modules_to_save": {**both, "modules_to_save": ["lm_head"]},
        "norms": {**both, "modules_to_save": ["norm"]},
        "head": {"target_modules": [one, "lm_head"]},
        "embedding": {"target_modules": [one, "embed_tokens"]},
        "embedding and head": {"target_modules": [one, "embed_tokens", "lm_head"]},
        "tied embedding": {"target_modules": [one, "embed_tokens"], "ensure_weight_tying": True},
        "whole vocabulary, tied": {**both, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "tokens": {**both, "trainable_token_indices": [3, 1]},
        "layers_to_transform": {**both, "layers_to_transform": [1]},
        "layers_pattern": {**both, "layers_to_transform": [0], "layers_pattern": "layers"},
        "exclude_modules": {"target_modules": "all-linear", "exclude_modules": [two]},
    }
    if family in MOE:
        found["target_parameters"] = {**both, "target_parameters": EXPERTS}
    return found


SWEEP = [(family, name) for family in FAMILIES for name in settings_of(family)]
#: A part for every run: each family once, with another setting each.
SMALL = [
    ("qwen2", "patterns of layers"),
    ("mistral", "DoRA and rsLoRA"),
    ("deepseek_v2", "exclude_modules"),
    ("gemma2", "tokens"),
]
#: What is refused by name, in every family.
REFUSED = {"lora_bias": "lora_bias"}
#: What gives a tied model two matrices.
UNTIES = ("modules_to_save", "head", "embedding", "embedding and head", "tied embedding")


def check(family: str, name: str, folder: Path) -> None:
    settings = settings_of(family)[name]
    if name in REFUSED:
        try:
            made = adapt(family, folder, **settings)
        except (ValueError, NotImplementedError):
            return  # PEFT itself has no such adapter
        with pytest.raises(MbxError, match=REFUSED[name]):
            plan_merge(made.base, made.adapter, folder / "merged", Options())
        return
    try:
        made = adapt(family, folder, **settings)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"PEFT: {error}")
    run(plan_merge(made.base, made.adapter, folder / "merged", Options()))
    model = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    if untied := model.config.get_text_config().tie_word_embeddings and name in UNTIES:
        # the adapted model computes with two matrices, of which PEFT's merge makes one again: it says to untie first
        model.config.get_text_config().tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model = peft.PeftModel.from_pretrained(model, made.adapter).merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder / "expected")
    expected, got, before = weights(folder / "expected"), weights(folder / "merged"), weights(made.base)
    if untied and name == "tied embedding":  # what PEFT adapts of one, it adapts of the other
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert got.keys() >= before.keys() and got.keys() - expected.keys() <= before.keys()
    shared = expected.keys() & got.keys()
    assert shared
    assert [key for key in shared if not torch.equal(got[key], expected[key].to(got[key].dtype))] == []
    assert any(key not in before or not torch.equal(got[key], before[key]) for key in shared)


@pytest.mark.parametrize(("family", "name"), SMALL)
def test_a_merge_is_that_of_peft(tmp_path: Path, family: str, name: str) -> None:
    check(family, name, tmp_path)


def test_weights_that_are_stored_the_other_way_round_are_merged_as_peft_does(tmp_path: Path) -> None:
    """GPT-2's, of which DoRA is refused."""
    made = adapt("gpt2", tmp_path / "lora", target_modules=["c_attn", "c_fc", "c_proj"])
    run(plan_merge(made.base, made.adapter, tmp_path / "merged", Options()))
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(made.base), made.adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    expected, got, before = weights(tmp_path / "expected"), weights(tmp_path / "merged"), weights(made.base)
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []
    assert sum(not torch.equal(got[key], before[key]) for key in expected) == 16
    dora = adapt("gpt2", tmp_path / "dora", target_modules=["c_attn"], use_dora=True)
    with pytest.raises(MbxError, match="fan_in_fan_out"):
        plan_merge(dora.base, dora.adapter, tmp_path / "again", Options())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [pair for pair in SWEEP if pair not in SMALL])
def test_every_setting_on_every_family(tmp_path: Path, family: str, name: str) -> None:
    check(family, name, tmp_path)
