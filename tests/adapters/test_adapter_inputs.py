"""Adapters as people have them: other spellings of names, pickles, and what touches the vocabulary."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from _peft_made import Made, adapt, same_files, weights
from safetensors.torch import load_file, save_file

from converters.adapters.settings import parse_settings
from converters.errors import CoverageError, UnsupportedError, UsageError
from mbx.formats.adapter_folder import WEIGHTS, open_base
from mbx.formats.peft import PICKLE
from mbx.run.adapters import plan_adapter_to_hf, plan_adapter_to_mcore
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.merge import plan_merge

Tensors = dict[str, torch.Tensor]


def merged(made: Made, target: Path, adapter: Path | None = None) -> Tensors:
    run(plan_merge(made.base, adapter or made.adapter, target, Options()))
    return weights(target)


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def respelt(made: Made, folder: Path, *changes: tuple[str, str], pickle: bool = False) -> Path:
    """The same adapter with other names of its tensors."""
    shutil.copytree(made.adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    for pattern, by in changes:
        tensors = {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}
    (folder / WEIGHTS).unlink()
    if pickle:
        torch.save(tensors, folder / PICKLE)
    else:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


# ---- names ------


@pytest.mark.parametrize(
    ("changes", "pickle"),
    [
        pytest.param([(r"lora_([AB])\.", r"lora_\1.default.")], False, id="adapter's name"),
        pytest.param([(r"lora_([AB])\.", r"lora_\1.my_run.")], False, id="another name"),
        pytest.param([(r"^base_model\.model\.", "")], False, id="without prefix"),
        pytest.param(
            [(r"^", "module."), (r"\.layers\.(\d)\.", r".layers.\1._fsdp_wrapped_module.")], False, id="FSDP"
        ),
        pytest.param([(r"^base_model\.model\.model\.", "base_model.model.")], False, id="decoder alone"),
        pytest.param([(r"^base_model\.model\.", "base_model.model.pretrained_model.")], False, id="value head"),
        pytest.param([], True, id="pickle"),
    ],
)
def test_a_spelling_of_names_changes_nothing(tmp_path: Path, changes: list[tuple[str, str]], pickle: bool) -> None:
    made = adapt("llama", tmp_path, target_modules=["q_proj", "down_proj"])
    other = respelt(made, tmp_path / "other", *changes, pickle=pickle)
    assert equal(merged(made, tmp_path / "a"), merged(made, tmp_path / "b", other))
    run(plan_adapter_to_mcore(other, tmp_path / "mcore", Options(), open_base(made.base)))
    run(plan_adapter_to_hf(tmp_path / "mcore", tmp_path / "back", Options(), open_base(made.base)))
    if not pickle:
        assert same_files(other, tmp_path / "back")
    assert equal(merged(made, tmp_path / "c", tmp_path / "mcore"), weights(tmp_path / "a"))


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    made = adapt("llama", tmp_path, target_modules=["q_proj"])
    other = respelt(made, tmp_path / "other", (r"layers\.0(.*)lora_([AB])\.", r"layers.0\1lora_\2.one."))
    tensors = load_file(other / WEIGHTS)
    save_file({re.sub(r"layers\.1(.*)lora_([AB])\.", r"layers.1\1lora_\2.two.", k): v for k, v in tensors.items()},
              other / WEIGHTS)  # fmt: skip
    with pytest.raises(UnsupportedError, match="2 adapters: one, two") as caught:
        merged(made, tmp_path / "m", other)
    assert "selected_adapters" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "way", ["model.language_model.", "language_model.model.", "model."], ids=["v5", "before 4.52", "text alone"]
)
def test_a_text_model_inside_a_larger_one_goes_by_every_name(tmp_path: Path, way: str) -> None:
    """The base's files say `language_model.model.`; patterns of ranks and scales follow the adapter's own names."""
    made = wrapped(tmp_path)
    own = "model.language_model."
    other = respelt(made, tmp_path / "other", (re.escape(own), way))
    path = other / "adapter_config.json"
    config = json.loads(path.read_text())
    pattern = {key.replace(own, way): value for key, value in config["alpha_pattern"].items()}
    path.write_text(json.dumps({**config, "alpha_pattern": pattern, "target_modules": ["q_proj", "down_proj"]}))
    expected = weights(tmp_path / "expected")
    assert equal(merged(made, tmp_path / "m", other), expected)
    run(plan_adapter_to_mcore(other, tmp_path / "mcore", Options(), open_base(made.base)))
    assert equal(merged(made, tmp_path / "n", tmp_path / "mcore"), expected)
    run(plan_adapter_to_hf(tmp_path / "mcore", tmp_path / "back", Options(), open_base(made.base)))
    assert same_files(other, tmp_path / "back")


TEXT = r".*language_model.*\.(q_proj|down_proj)"


def wrapped(folder: Path, targets: str = TEXT) -> Made:
    """A Gemma 3 with a vision tower, a LoRA on some of it, and PEFT's own merge in `expected`."""
    torch.manual_seed(0)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                num_key_value_heads=2, vocab_size=64, sliding_window=8, max_position_embeddings=64,
                layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=60
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder / "base")
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder / "base")
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets,
        alpha_pattern={r"model.language_model.layers.1.self_attn.q_proj": 9},
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(folder / "lora")
    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder / "base")
    whole = peft.PeftModel.from_pretrained(base, folder / "lora").merge_and_unload()
    whole.save_pretrained(folder / "expected")
    return Made(folder / "base", folder / "lora", adapted)


def test_what_peft_passes_over_is_an_error(tmp_path: Path) -> None:
    """Excluded modules, and expressions as targets: the tensors of modules that PEFT would leave out."""
    made = adapt("llama", tmp_path, target_modules=["q_proj", "down_proj"])
    path = made.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"exclude_modules": ["down_proj"]}, {"target_modules": r".*\.q_proj"}):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CoverageError, match="no target by adapter_config"):
            merged(made, tmp_path / "m")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*layers\.[01]\.self_attn.*"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r"model\.layers\.1\..*"},
    ],
)
def test_targets_and_exclusions_are_those_of_peft(config: dict[str, object]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = parse_settings({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})  # type: ignore[dict-item]
    oracle = peft.LoraConfig(**config)  # type: ignore[arg-type]
    for module in [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 12) for name in ("q_proj", "k_proj")]:
        assert settings.is_target(module) == bool(check_target_module_exists(oracle, module)), module


# ---- the vocabulary ------


def trained(folder: Path, *, tied: bool, rows: int | None = None, save: bool | str = "auto", **lora: object) -> Made:
    """A tiny Llama and an adapter of it with random values, saved by PEFT; `rows` resizes the vocabulary first."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **lora))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder / "lora", save_embedding_layers=save)
    return Made(folder / "base", folder / "lora", adapted.eval())


IDS = torch.arange(1, 33)[None]


def says_the_same(made: Made, folder: Path) -> bool:
    """Whether a merged folder computes what the adapter on its base computes, which is the reference."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.allclose(model(IDS).logits, made.model(IDS).logits, atol=1e-5)


VOCABULARY: dict[str, dict[str, object]] = {
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "single tokens": {"trainable_token_indices": {"embed_tokens": [9, 3, 5]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", VOCABULARY)
def test_a_merged_vocabulary_computes_what_the_adapter_does(tmp_path: Path, name: str, tied: bool) -> None:
    made = trained(tmp_path, tied=tied, **{"target_modules": ["q_proj"], **VOCABULARY[name]})
    run(plan_merge(made.base, made.adapter, tmp_path / "hf", Options()))
    assert says_the_same(made, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and name == "single tokens")
    run(plan_merge(made.base, made.adapter, tmp_path / "mcore", Options(), to="mcore"))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options()))
    assert equal(weights(tmp_path / "back"), weights(tmp_path / "hf"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    if tied:
        with pytest.raises(AssertionError):  # the base is not what the adapter computes
            assert says_the_same(made, made.base)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_is_taken_whole(tmp_path: Path, tied: bool) -> None:
    made = trained(tmp_path, tied=tied, rows=72, save=True, target_modules=["q_proj"])
    run(plan_merge(made.base, made.adapter, tmp_path / "hf", Options()))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (72, tied)
    assert says_the_same(made, tmp_path / "hf")


def test_rows_are_replaced_in_a_megatron_base_too(tmp_path: Path) -> None:
    made = trained(tmp_path, tied=True, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [63, 0]})
    run(plan_merge(made.base, made.adapter, tmp_path / "hf", Options()))
    run(plan_hf_to_mcore(made.base, tmp_path / "ckpt", Options()))
    for to in ("hf", "mcore"):
        run(plan_merge(tmp_path / "ckpt", made.adapter, tmp_path / f"to-{to}", Options(), to=to))
    run(plan_mcore_to_hf(tmp_path / "to-mcore", tmp_path / "back", Options()))
    for folder in ("to-hf", "back"):
        assert equal(weights(tmp_path / folder), weights(tmp_path / "hf"))


def test_what_a_vocabulary_cannot_take_is_named(tmp_path: Path) -> None:
    made = trained(tmp_path / "a", tied=False, target_modules=["q_proj"], modules_to_save=["lm_head"])
    run(plan_hf_to_mcore(made.base, tmp_path / "ckpt", Options()))
    with pytest.raises(UnsupportedError, match="lm_head") as caught:
        plan_merge(tmp_path / "ckpt", made.adapter, tmp_path / "m", Options())
    assert "mcore-to-hf" in (caught.value.hint or "")
    with pytest.raises(UnsupportedError, match="no adapter of a linear") as caught:
        plan_adapter_to_mcore(made.adapter, tmp_path / "m", Options(), open_base(made.base))
    assert "convert merge" in (caught.value.hint or "")
    tensors = load_file(made.adapter / WEIGHTS)
    key = "base_model.model.lm_head.weight"
    save_file({**tensors, key: tensors[key].repeat(2, 1)}, made.adapter / WEIGHTS)
    with pytest.raises(CoverageError, match="resized in one of two matrices") as caught:
        plan_merge(made.base, made.adapter, tmp_path / "m", Options())
    assert "save_embedding_layers" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="different token ids"):
        parse_settings({"peft_type": "LORA", "trainable_token_indices": [1, 1]})


def test_an_embedding_with_dora_is_refused_by_name(tmp_path: Path) -> None:
    made = trained(tmp_path, tied=False, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    with pytest.raises(UnsupportedError, match="embed_tokens.*with DoRA") as caught:
        plan_merge(made.base, made.adapter, tmp_path / "m", Options())
    assert "merge_and_unload" in (caught.value.hint or "")


def test_what_no_adapter_checkpoint_holds_is_named(tmp_path: Path) -> None:
    made = trained(tmp_path, tied=True, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UnsupportedError, match="`model.embed_tokens.weight`.*no adapter of a linear") as caught:
        plan_adapter_to_mcore(made.adapter, tmp_path / "m", Options(), open_base(made.base))
    assert "convert merge" in (caught.value.hint or "")
    tensors = load_file(made.adapter / WEIGHTS)
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file({**tensors, name: tensors[name][:, :63].contiguous()}, made.adapter / WEIGHTS)
    with pytest.raises(CoverageError, match=r"a matrix of \[63, 32\]; the base holds it as \[64, 32\]"):
        plan_merge(made.base, made.adapter, tmp_path / "m", Options())


# ---- beside the text model ------


def test_modules_beside_the_text_model_are_merged_as_they_are_stored(tmp_path: Path) -> None:
    made = wrapped(tmp_path, r".*\.(q_proj|down_proj|fc1)")
    expected, before = weights(tmp_path / "expected"), weights(made.base)
    assert equal(merged(made, tmp_path / "m"), expected)
    changed = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert sum("vision" in name for name in changed) == 3 and sum("language" in name for name in changed) == 4
    with pytest.raises(UnsupportedError, match="vision.*of the model around the text model") as caught:
        plan_merge(made.base, made.adapter, tmp_path / "c", Options(), to="mcore")
    assert "mbx convert hf-to-mcore" in (caught.value.hint or "")
    with pytest.raises(CoverageError, match="3 of 7 adapted modules.*vision_tower") as refused:
        plan_adapter_to_mcore(made.adapter, tmp_path / "c", Options(), open_base(made.base))
    assert "the model around the text model" in (refused.value.hint or "")
    assert "mbx convert merge" in (refused.value.hint or "")
