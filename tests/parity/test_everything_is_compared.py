"""What lies beside the weights is compared, or named as not compared; equal things under other spellings are equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _planted import convert
from _stores import changed_hf
from safetensors.torch import save_file

from converters.mcore.flavours import TEXT_ALONE
from fixtures.make_tiny import make
from fixtures.wrapped import make_wrapped
from mbx.cli import main
from mbx.formats.hf import KEPT
from mbx.proof.parity import ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore
from mbx.run.job import run as carry_out
from mbx.run.reshard import plan_mcore_to_mcore


def config_lines(report: ParityReport) -> str:
    leg = next(leg for leg in report.legs if leg.name == "config")
    assert (leg.status == "failed") == bool(leg.details) or leg.status == "not run"
    return "\n".join(leg.details)


def gap_lines(report: ParityReport) -> str:
    return "\n".join(gap.line for gap in report.gaps)


def beside(checkpoint: Path) -> Path:
    return next(checkpoint.glob("iter_*")) / "hf"


def changed_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny / "llama", convert(tiny / "llama", tmp_path_factory.mktemp("good") / "mcore")


@pytest.fixture
def folder(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "hf"))


@pytest.fixture
def checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "mcore"))


def turned_vocabulary(said: dict[str, Any]) -> None:
    words = said["model"]["vocab"]
    said["model"]["vocab"] = {word: len(words) - 1 - number for word, number in words.items()}


FILES: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another vocabulary": ("tokenizer.json", turned_vocabulary, "vocabulary"),
    "another normalizer": ("tokenizer.json", lambda s: s.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "another end token": ("tokenizer_config.json", lambda s: s.update(eos_token="<other>"), "eos_token"),
    "a template": ("tokenizer_config.json", lambda s: s.update(chat_template="{{ x }}"), ""),
    "another end id": ("config.json", lambda s: s.update(eos_token_id=77), "eos_token_id"),
    "another list of ends": ("generation_config.json", lambda s: s.update(eos_token_id=[2, 7]), "eos_token_id"),
    "sampled otherwise": ("generation_config.json", lambda s: s.update(do_sample=True, top_k=3), "top_k"),
    "an end behind texts": ("tokenizer_config.json", lambda s: s.update(add_eos_token=True), "add_eos_token"),
    "another special token": (
        "tokenizer_config.json",
        lambda s: s.update(additional_special_tokens=["w5"]),
        "special tokens",
    ),
    "names of outputs": ("config.json", lambda s: s.update(id2label={"0": "good", "1": "bad"}), "id2label"),
}


@pytest.mark.parametrize("name", FILES)
def test_another_file_beside_the_weights_is_a_difference(name: str, folder: Path, checkpoint: Path) -> None:
    file, change, named = FILES[name]
    changed_json(beside(checkpoint) / file, change)
    for sides in ((folder, checkpoint), (checkpoint, folder)):
        report = parity(*sides)
        assert not report.proved
        assert named in (config_lines(report) if named else gap_lines(report))
        assert named == "" or not report.passed


#: Files that both sides have, as text, of which another is another model: of any kind of tokenizer and processor.
READ_BY_MODELS = {
    "tiktoken.model": ("1 0", "2 0"),
    "tekken.json": ("{}", '{"vocab": []}'),
    "additional_chat_templates/tool.jinja": ("{{ x }}", "{{ y }}"),
    "preprocessor_config.json": ('{"image_mean": [0.5]}', '{"image_mean": [0.4]}'),
    "tokenization_own.py": ("class Own: ...", "class Own: pass"),
}


@pytest.mark.parametrize("name", READ_BY_MODELS)
def test_whatever_reads_texts_and_images_is_compared(name: str, folder: Path, tmp_path: Path) -> None:
    own = {"AutoTokenizer": ["tokenization_own.Own", None]}
    changed_json(folder / "tokenizer_config.json", lambda s: s.update(auto_map=own))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    alone = Path(shutil.copytree(folder, tmp_path / "alone"))
    for side, text in zip((folder, other), READ_BY_MODELS[name], strict=True):
        (side / name).parent.mkdir(exist_ok=True)
        (side / name).write_text(text)
    assert parity(folder, folder).proved and not parity(folder, alone).proved
    assert Path(name).stem in config_lines(parity(folder, other))


def test_a_tokenizer_without_tokenizer_json_is_compared_by_all_that_it_says(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    changed_json(folder / "tokenizer_config.json", lambda s: s.update(tokenizer_class="LlamaTokenizer"))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    changed_json(other / "tokenizer_config.json", lambda s: s.update(tokenizer_class="LlamaTokenizerFast"))
    assert parity(folder, other).proved, "the same class, faster"
    changed_json(other / "tokenizer_config.json", lambda s: s.update(tokenizer_class="OtherTokenizer"))
    assert "tokenizer_class" in config_lines(parity(folder, other))
    added = {"250": {"content": "<x>"}}
    changed_json(other / "tokenizer_config.json", lambda s: s.update(added_tokens_decoder=added))
    assert "added_tokens_decoder" in config_lines(parity(folder, other))


def test_templates_are_the_same_wherever_they_are_kept(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    listed = [{"name": "default", "template": "{{ x }}"}, {"name": "tool", "template": "{{ y }}"}]
    changed_json(folder / "tokenizer_config.json", lambda s: s.update(chat_template=listed))
    (other / "chat_template.jinja").write_text("{{ x }}\n")
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tool.jinja").write_text("{{ y }}")
    assert parity(folder, other).proved
    (other / "additional_chat_templates" / "tool.jinja").write_text("{{ z }}")
    assert "`tool`" in config_lines(parity(folder, other))


def test_one_end_token_is_a_list_of_one(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    changed_json(other / "config.json", lambda s: s.update(eos_token_id=[s["eos_token_id"]]))
    assert parity(folder, other).proved


def test_two_chat_templates_differ_wherever_they_are_kept(folder: Path, checkpoint: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    changed_json(
        beside(checkpoint) / "tokenizer_config.json", lambda said: said.update(chat_template="{{ messages }}")
    )
    assert parity(folder, checkpoint).proved
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert "chat template" in config_lines(parity(folder, checkpoint))


def test_other_spellings_of_the_same_files_are_no_difference(folder: Path, checkpoint: Path) -> None:
    hf = beside(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        changed_json(hf / name, lambda said: None)  # another layout
    changed_json(
        hf / "tokenizer_config.json", lambda said: said.update(name_or_path="elsewhere", backend="tokenizers")
    )
    changed_json(hf / "generation_config.json", lambda said: said.update(transformers_version="0", temperature=1.0))
    assert parity(folder, checkpoint).proved


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_beside_the_weights_is_a_finding(file: str, folder: Path, checkpoint: Path) -> None:
    (beside(checkpoint) / file).write_text("{")
    assert file in config_lines(parity(folder, checkpoint))


def test_what_one_side_alone_has_is_named_and_no_proof(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in beside(checkpoint).glob("tokenizer*"):
        path.unlink()
    report = parity(folder, checkpoint)
    assert report.passed and not report.proved and "not compared: `tokenizer.json`" in gap_lines(report)
    command = ["verify", "parity", str(folder), str(checkpoint)]
    assert main(command) == 1
    assert "not compared: " in capsys.readouterr().out
    assert main([*command, "--allow-gap", "not compared: *tokenizer*"]) == 1, "there is a chat template too"
    assert main([*command, "--allow-gap", "not compared: *tokenizer*", "--allow-gap", "*template*"]) == 0
    assert main([*command, "--allow-gap", "not reached: *"]) == 1


# --- three statements of one model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sidecar", ["args", "run_config.yaml"])
def test_sidecars_that_say_another_model_are_a_difference(sidecar: str, folder: Path, checkpoint: Path) -> None:
    iteration = next(checkpoint.glob("iter_*"))
    if sidecar == "args":
        common = torch.load(iteration / "common.pt", weights_only=False)
        common["args"].rotary_base = 1234
        torch.save(common, iteration / "common.pt")
    else:
        text = (iteration / "run_config.yaml").read_text()
        line = next(line for line in text.splitlines() if "rotary_base:" in line)
        (iteration / "run_config.yaml").write_text(text.replace(line, line.split(":")[0] + ": 1234"))
    found = config_lines(parity(folder, checkpoint))
    assert "rotary_base" in found and "1234" in found and sidecar in found
    other = config_lines(parity(checkpoint, checkpoint))
    assert "rotary_base" in other, "also where both sides disagree with themselves alike"


# --- other models in the same folder -------------------------------------------------------------------------------


def test_an_adapter_beside_whole_weights_is_another_model(folder: Path, pair: tuple[Path, Path]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
    for other in pair:
        for sides in ((folder, other), (other, folder)):
            report = parity(*sides)
            assert not report.passed and "adapter" in config_lines(report)
    twice = parity(folder, folder)
    assert twice.passed and not twice.proved and "adapter" in gap_lines(twice)


def test_a_run_that_also_holds_other_weights_says_which_it_read(pair: tuple[Path, Path], checkpoint: Path) -> None:
    shutil.copytree(pair[0], checkpoint, dirs_exist_ok=True)
    report = parity(pair[0], checkpoint)
    assert report.passed and not report.proved and "Hugging Face weights" in gap_lines(report)


def test_code_of_its_own_is_a_difference(folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    changed_json(folder / "config.json", lambda s: s.update(auto_map={"AutoModelForCausalLM": "modeling_own.Own"}))
    assert parity(pair[0], folder).proved, "code that is not there is read by nobody"
    (folder / "modeling_own.py").write_text("class Own: ...\n")
    assert "auto_map" in config_lines(parity(pair[0], folder))
    shutil.copytree(folder, other := tmp_path / "other")
    assert parity(folder, other).proved
    (other / "modeling_own.py").write_text("class Own: pass\n")
    assert "modeling_own.py" in config_lines(parity(folder, other))


# --- towers and keys without a Megatron Core field -----------------------------------------------------------------


def test_a_vision_config_is_compared_key_by_key(tmp_path: Path) -> None:
    source = make_wrapped("gemma3", tmp_path / "hf")
    good = convert(source, tmp_path / "mcore")
    assert parity(source, good).proved
    vision = json.loads((source / "config.json").read_text())["vision_config"]
    other = changed_hf(source, tmp_path / "other", config={"vision_config": {**vision, "num_attention_heads": 77}})
    for sides in ((source, other), (other, good), (good, other)):
        assert "vision_config.num_attention_heads" in config_lines(parity(*sides))


def test_a_tower_is_compared_between_two_checkpoints(tmp_path: Path) -> None:
    source = make_wrapped("gemma3", tmp_path / "hf")
    text = Options(sync=False, flavour=TEXT_ALONE)
    carry_out(plan_hf_to_mcore(source, good := tmp_path / "mcore", text))
    carry_out(plan_mcore_to_mcore(good, again := tmp_path / "again", Options(sync=False)))
    assert parity(good, again).proved
    kept = beside(again) / KEPT
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    assert "weights" in {leg.name for leg in parity(good, again).legs if leg.status == "failed"}
    kept.unlink()
    report = parity(good, again)
    assert report.passed and not report.proved and "beside the text model" in gap_lines(report)


def test_kinds_of_layers_that_megatron_core_has_not_are_compared(tmp_path: Path) -> None:
    source = make("llama4_scout", tmp_path / "hf")
    full = changed_hf(source, tmp_path / "full", config={"layer_types": ["full_attention"] * 4})
    assert "layer_types" in config_lines(parity(source, full))
    spelt = changed_hf(
        source, tmp_path / "spelt", config={"layer_types": ["chunked_attention"] * 3 + ["full_attention"]}
    )
    assert parity(source, spelt).proved, "what the class makes of an absent key"


def test_equal_folders_that_megatron_core_has_no_counterpart_for_are_equal(folder: Path, tmp_path: Path) -> None:
    changed_json(folder / "config.json", lambda said: said.update(attention_bias=True))
    shutil.copytree(folder, other := tmp_path / "other")
    assert parity(folder, other).proved
    changed_json(other / "config.json", lambda said: said.update(attention_bias=False))
    assert "attention_bias" in config_lines(parity(folder, other)) + str(parity(folder, other).legs)
    changed_json(other / "config.json", lambda said: said.update(attention_bias=True, rope_theta=7.0))
    assert "rope_theta" in config_lines(parity(folder, other))


def test_default_keys_of_a_type_without_a_table_may_be_absent(folder: Path, tmp_path: Path) -> None:
    keep = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size")

    def gpt_neox(said: dict[str, Any]) -> None:
        kept = {key: said[key] for key in keep}
        said.clear()
        said.update(kept, model_type="gpt_neox")

    changed_json(folder / "config.json", gpt_neox)
    shutil.copytree(folder, other := tmp_path / "other")
    changed_json(other / "config.json", lambda said: said.update(rotary_pct=0.25, use_parallel_residual=True))
    assert "rotary_pct" not in config_lines(parity(folder, other))
    changed_json(other / "config.json", lambda said: said.update(use_parallel_residual=False))
    assert "use_parallel_residual" in config_lines(parity(folder, other))


# --- ranks ---------------------------------------------------------------------------------------------------------


def test_every_process_of_a_pod_compares_where_nothing_is_spread(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed_hf(pair[0], tmp_path / "other", lambda t: t["model.norm.weight"].add_(1))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["verify", "parity", str(pair[0]), str(other)]) == 1
    assert main(["verify", "parity", str(pair[0]), str(pair[1])]) == 0
