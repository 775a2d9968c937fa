"""A dry run foretells every file of the target with its size, whatever is converted into whatever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from _cli import TINY, Run

from fixtures.make_tiny import make


def files_below(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def assert_foretold(mbx: Run, target: Path, *arguments: object) -> dict[str, int]:
    """Plan, then run; returns the plan's files."""
    foretold = mbx("convert", *arguments, "--dry-run", "--json")
    assert foretold.code == 0 and not target.exists(), foretold.stdout
    assert mbx("convert", *arguments).code == 0
    said = {file["path"]: file["bytes"] for file in foretold.document["plan"]["files"]}
    made = files_below(target)
    assert said.keys() == made.keys()
    assert {name: size for name, size in said.items() if size not in (None, made[name])} == {}
    needed = foretold.document["plan"]["disk"]["needed_bytes"]
    assert needed == sum(size for size in said.values() if size is not None)
    return said


@pytest.mark.parametrize("options", [(), ("--format", "torch", "--tp", 2), ("--format", "fsdp_dtensor")])
def test_imports(mbx: Run, here: Path, options: tuple[object, ...]) -> None:
    assert_foretold(mbx, here / "ckpt", "hf-to-mcore", TINY / "llama", "ckpt", *options)


def test_a_quantised_source_and_back_and_another_layout(mbx: Run, here: Path) -> None:
    source = make("deepseek_v3_fp8", here / "source")
    made = assert_foretold(mbx, here / "ckpt", "hf-to-mcore", source, "ckpt", "--tp", 2)
    assert made["iter_0000000/hf/mbx_scales.safetensors"] > 0
    assert_foretold(mbx, here / "plain", "mcore-to-hf", "ckpt", "plain")
    assert_foretold(mbx, here / "same", "mcore-to-hf", "ckpt", "same", "--codec", "same")
    assert_foretold(mbx, here / "other", "reshard", "ckpt", "other", "--ep", 2)


def test_a_tokenizer_is_shown_in_both_of_its_folders(mbx: Run, here: Path) -> None:
    shown = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--dry-run").stdout
    assert "hf/: config.json" in shown and "tokenizer/: special_tokens_map.json" in shown
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt").code == 0
    back = mbx("convert", "mcore-to-hf", "ckpt", "back", "--dry-run").stdout
    assert "copied   config.json" in back


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--allow-missing", "nope*", "matches nothing that is missing"),
        ("--allow-unused", "model.*", "matches nothing that is left over"),
        ("--allow-unused-key", "hidden_size", "no such unknown key"),
    ],
)
def test_a_waiver_that_waives_nothing_is_said(mbx: Run, here: Path, option: str, value: str, words: str) -> None:
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", option, value, "--dry-run")
    assert said.code == 0 and f"{option} " in said.stdout and words in said.stdout


def test_a_waiver_that_waives_is_no_such_note(mbx: Run, here: Path) -> None:
    shutil.copytree(TINY / "llama", "llama")
    config = json.loads(Path("llama/config.json").read_text())
    Path("llama/config.json").write_text(json.dumps({**config, "zork": 4}))
    assert mbx("convert", "hf-to-mcore", "llama", "ckpt", "--dry-run").code == 3
    said = mbx("convert", "hf-to-mcore", "llama", "ckpt", "--allow-unused-key", "zork", "--dry-run")
    assert said.code == 0 and "had no effect" not in said.stdout


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("torch_dtype", 5, 2, "a name like 'bfloat16' was expected"),
        ("rope_parameters", 4, 2, "an object was expected"),
        ("tie_word_embeddings", "yes", 2, "a value like False was expected"),
        ("quantization_config", "fp8", 2, "expected an object"),
        ("quantization_config", {}, 3, "has no `quant_method`"),
        ("num_hidden_layers", 3, 3, "goes from 0 to 3 in the source, and by the config to 2"),
        ("num_hidden_layers", 9, 3, "goes from 0 to 3 in the source, and by the config to 8"),
        ("vocab_size", 250, 3, "250 rows were expected"),
    ],
)
def test_a_config_of_another_kind(mbx: Run, here: Path, key: str, value: object, code: int, words: str) -> None:
    shutil.copytree(TINY / "llama", "llama")
    config = json.loads(Path("llama/config.json").read_text())
    Path("llama/config.json").write_text(json.dumps({**config, key: value}))
    said = mbx("convert", "hf-to-mcore", "llama", "ckpt")
    assert said.code == code and words in said.stderr
    assert not Path("ckpt").exists()


def test_missing_layers_in_the_middle_are_no_matter_of_counts(mbx: Run, here: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY / "llama", "llama")
    tensors = {}
    for file in Path("llama").glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    Path("llama/model.safetensors.index.json").unlink()
    save_file({n: t for n, t in tensors.items() if ".layers.1." not in n}, "llama/model.safetensors")
    said = mbx("convert", "hf-to-mcore", "llama", "ckpt")
    assert said.code == 3 and "goes from" not in said.stderr and "--allow-missing" in said.stderr


def test_a_config_that_says_quantised_of_plain_weights(mbx: Run, here: Path) -> None:
    shutil.copytree(TINY / "llama", "llama")
    config = json.loads(Path("llama/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    Path("llama/config.json").write_text(json.dumps(config))
    assert "no tensor is" in mbx("convert", "hf-to-mcore", "llama", "ckpt", "--dry-run").stdout


def test_uneven_ends_say_what_is_left(mbx: Run, here: Path) -> None:
    first = "--decoder-first-pipeline-num-layers"
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--pp", 2, first, 9)
    assert said.code == 2 and "9 of 4 layers at the ends: that is 5 too many" in said.stderr
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--pp", 3, first, 1)
    assert said.code == 2 and "3 are left, which 2 stages cannot share" in said.stderr
