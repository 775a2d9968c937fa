"""Keys of config.json that no model reads: those that are known pass, a waiver travels, a hint names what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from _cli import Run

from converters.rows.config_spelling import PROVENANCE
from fixtures.make_tiny import make

FOUND = {"unsloth_fixed": True, "unsloth_version": "2026.2.1", "transformers.js_config": {"dtype": "q4"},
         "neftune_noise_alpha": 5, "quantization": {"bits": 4}, "_commit_hash": "a"}  # fmt: skip
MANIFEST = "mbx_manifest.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "base")


def stamp(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}, indent=2))


def same(left: Path, right: Path) -> bool:
    return all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in ("config.json", "model.safetensors")
    )


def test_known_keys_pass_with_a_note_and_come_back_byte_for_byte(mbx: Run, base: Path, here: Path) -> None:
    stamp(base, **FOUND)
    said = mbx("convert", "hf-to-mcore", base, "ckpt", "--json")
    assert said.code == 0
    assert any("unsloth_fixed" in note and "no model reads" in note for note in said.document["plan"]["notes"])
    assert mbx("verify", "parity", base, "ckpt").code == 0
    assert mbx("convert", "mcore-to-hf", "ckpt", "back").code == 0
    assert same(base, here / "back")


def test_no_model_of_transformers_reads_what_is_passed(tmp_path: Path) -> None:
    """The oracle is Transformers' own text: no forward pass asks a config for any of these keys."""
    source = Path(transformers.__file__).parent / "models"
    plain = [key for key in PROVENANCE if re.fullmatch(r"\w+", key) and not key.startswith("_")]
    wanted = re.compile(r"\bconfig\.(?:" + "|".join(plain) + r"|unsloth_\w+|axolotl_\w+)\b")
    readers = [path.name for path in source.glob("*/modeling_*.py") if wanted.search(path.read_text(encoding="utf-8"))]
    assert readers == []


def test_a_waiver_given_once_holds_for_verify_and_for_the_way_back(mbx: Run, base: Path, here: Path) -> None:
    stamp(base, of_tomorrow=3)
    refused = mbx("convert", "hf-to-mcore", base, "ckpt")
    assert refused.code == 3 and "--allow-unused-key" in refused.stderr
    assert mbx("convert", "hf-to-mcore", base, "ckpt", "--allow-unused-key", "of_tomorrow").code == 0
    assert json.loads((here / "ckpt" / MANIFEST).read_text())["waived"]["config_keys"] == ["of_tomorrow"]
    for command in (
        ["verify", "parity", base, "ckpt"],
        ["diff", base, "ckpt"],
        ["convert", "mcore-to-hf", "ckpt", "b"],
    ):
        assert mbx(*command).code == 0, command
    assert same(base, here / "b")
    assert mbx("convert", "hf-to-mcore", "b", "again").code == 0  # the export's own manifest has it too
    (here / "ckpt" / MANIFEST).unlink()
    assert mbx("verify", "parity", base, "ckpt").code != 0
    assert mbx("verify", "parity", base, "ckpt", "--allow-unused-key", "of_tomorrow").code == 0


COMMANDS = {
    "hf-to-mcore": ["convert", "hf-to-mcore", "BASE", "out"],
    "merge": ["convert", "merge", "BASE", "LORA", "out"],
    "adapter-to-mcore": ["convert", "adapter-to-mcore", "LORA", "out", "--base", "BASE"],
    "parity": ["verify", "parity", "BASE", "CKPT"],
    "diff": ["diff", "BASE", "CKPT"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hint_names_an_option_that_the_command_has(
    mbx: Run, base: Path, here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mbx("convert", "hf-to-mcore", base, "ckpt").code == 0
    make_lora(base, here / "lora")
    stamp(base, of_tomorrow=3)
    places = {"BASE": base, "LORA": here / "lora", "CKPT": here / "ckpt"}
    command = [places.get(word, word) for word in COMMANDS[name]]
    refused = mbx(*command)
    assert refused.code == 3 and "of_tomorrow" in refused.stderr
    (option,) = set(re.findall(r"--[a-z-]+", refused.stderr.partition("hint:")[2]))
    assert mbx(*command, option, "of_tomorrow").code == (name == "diff")  # which shows the key as a difference


def make_lora(base: Path, folder: Path) -> None:
    """A LoRA of one projection, of PEFT's own making."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(folder)


def test_a_recipe_says_where_the_key_can_stand(mbx: Run, base: Path, here: Path) -> None:
    stamp(base, of_tomorrow=3)
    said = mbx("budget", "--recipe", "llama32_1b_lora", f"model={base}")
    assert said.code == 3 and "--allow-unused-key" not in said.stderr
    assert "may be waived: model.allow_unused_key=of_tomorrow" in said.stderr
    shorter = ("data.length=32", f"model={base}")
    assert mbx("budget", "--recipe", "llama32_1b_lora", *shorter, "model.allow_unused_key=of_tomorrow").code == 0
