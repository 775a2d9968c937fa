"""What a folder is has one answer, through every command and Python, also where files of several kinds lie in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mbx
from converters.errors import MbxError
from mbx.cli import main
from mbx.formats.registry import sniff

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "base_model_name_or_path": None}


def adapter(folder: Path, base: Path) -> None:
    """A LoRA of every `o_proj`, as PEFT saves one."""
    with mbx.open(base) as opened:
        names = [name for name in opened if name.endswith("o_proj.weight")]
        factors = {}
        for name in names:
            rows, cols = opened.spec(name).shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": torch.ones(2, cols), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA))


@pytest.fixture(scope="module")
def kinds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind by its name, and some that have files of several."""
    root = tmp_path_factory.mktemp("kinds")
    shutil.copytree(tiny / "llama", root / "hf")
    for name, form in (("dist", "torch_dist"), ("legacy", "torch"), ("fsdp", "fsdp_dtensor")):
        mbx.convert(root / "hf", root / name, mbx.Options(format=form))
    (root / "lora").mkdir()
    adapter(root / "lora", root / "hf")
    no_weights = shutil.ignore_patterns("*.safetensors")
    for name in ("dist", "legacy", "fsdp"):  # config.json and tokenizer beside the tracker, as trainers leave them
        shutil.copytree(root / name, root / f"{name}+config")
        shutil.copytree(root / "hf", root / f"{name}+config", dirs_exist_ok=True, ignore=no_weights)
    shutil.copytree(root / "dist", root / "dist+weights")  # a run's root that also holds its base
    shutil.copytree(root / "hf", root / "dist+weights", dirs_exist_ok=True)
    shutil.copytree(root / "hf", root / "hf+lora")
    adapter(root / "hf+lora", root / "hf")
    shutil.copytree(root / "lora", root / "lora+config")  # as trainers save adapters
    shutil.copyfile(root / "hf" / "config.json", root / "lora+config" / "config.json")
    mbx.convert(root / "lora", root / "lora-dist", base=root / "hf")
    return root


#: Folder → its format, and whose names its tensors have.
ANSWERS = {
    "hf": ("huggingface", "hf"),
    "hf+lora": ("huggingface", "hf"),
    "dist": ("torch_dist", "mcore"),
    "dist/iter_0000000": ("torch_dist", "mcore"),
    "dist/iter_0000000/hf": ("huggingface", "hf"),
    "dist+config": ("torch_dist", "mcore"),
    "dist+weights": ("torch_dist", "mcore"),
    "legacy": ("torch", "mcore"),
    "legacy/iter_0000000": ("torch", "mcore"),
    "legacy+config": ("torch", "mcore"),
    "fsdp": ("fsdp_dtensor", "mcore"),
    "fsdp+config": ("fsdp_dtensor", "mcore"),
    "lora": ("peft", "peft"),
    "lora+config": ("peft", "peft"),
    "lora-dist": ("torch_dist", "mcore"),
}
TITLES = {"torch": "megatron legacy", "peft": "peft adapter"}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_way_in_gives_the_same_answer(
    kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder, (format, spelling) = kinds / name, ANSWERS[name]
    bare = name.endswith("/hf")  # side files alone: a config, and no weights
    is_adapter = name.startswith("lora")

    def command(*words: object) -> int:
        code = main([*map(str, words), "--json"])
        said.update(json.loads(capsys.readouterr().out))
        return code

    said: dict[str, object] = {}
    assert (sniff(folder).format.name, sniff(folder).format.spelling) == (format, spelling)
    assert command("inspect", folder) == (4 if bare else 0)
    assert said["format"] == TITLES.get(format, format) == mbx.inspect(folder).format
    if not bare:
        with mbx.open(folder) as opened:
            assert (opened.format, opened.spelling) == (format, spelling)
    takers = {
        "hf-to-mcore": spelling == "hf" and not bare,
        "mcore-to-hf": spelling == "mcore" and not is_adapter,
        "reshard": spelling == "mcore" and not is_adapter,
        "adapter-to-mcore": spelling == "peft",
        "adapter-to-hf": name == "lora-dist",
    }
    for verb, takes in takers.items():
        base = ("--base", kinds / "hf") if verb.startswith("adapter") else ()
        assert (command("convert", verb, folder, tmp_path / verb, *base, "--dry-run") == 0) == takes, verb
    if is_adapter:
        assert command("convert", "merge", kinds / "hf", folder, tmp_path / "merged", "--dry-run") == 0
    elif not bare:
        assert command("convert", "merge", folder, kinds / "lora", tmp_path / "merged", "--dry-run") == 0
        assert command("diff", folder, kinds / "hf") == 0
        holds_two = name in ("hf+lora", "dist+weights")  # whole weights, and what other readers make another model of
        assert (command("verify", "parity", folder, kinds / "hf") == 0) != holds_two
        assert mbx.verify(folder, kinds / "hf").proved != holds_two


@pytest.mark.parametrize(
    "name", [name for name in ANSWERS if not name.startswith("lora") and not name.endswith("/hf")]
)
def test_the_trainer_starts_from_what_everyone_sees(kinds: Path, name: str) -> None:
    from mbx.train.model.blueprint import blueprint
    from mbx.train.model.weights import check_source
    from mbx.train.recipe.parse import parse_recipe

    recipe = parse_recipe({"model": {"path": str(kinds / "hf")}, "data": {"kind": "pattern", "length": 8}})
    check_source(blueprint(recipe), kinds / name)


@pytest.mark.parametrize("name", ["nothing", "notes.txt", "empty"])
def test_what_is_nothing_is_nothing_everywhere(kinds: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a note")
    for call in (mbx.open, mbx.inspect):
        with pytest.raises(MbxError):
            call(tmp_path / name)
    for words in (["inspect"], ["convert", "hf-to-mcore"], ["convert", "mcore-to-hf"], ["convert", "reshard"]):
        target = [] if words == ["inspect"] else [str(tmp_path / "new"), "--dry-run"]
        assert main(["-qq", *words, str(tmp_path / name), *target]) == 4
