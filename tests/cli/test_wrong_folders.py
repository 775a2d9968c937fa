"""A folder of another kind than a command takes: one error that says what it is and which command takes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from _cli import TINY, Run


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind by its name; `lora` holds no tensors, so nothing may get as far as reading them."""
    from mbx.cli import main

    root = tmp_path_factory.mktemp("kinds")
    shutil.copytree(TINY / "llama", root / "hf")
    assert main(["-qq", "convert", "hf-to-mcore", str(root / "hf"), str(root / "mcore")]) == 0
    (root / "empty").mkdir()
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "hf", "r": 4, "lora_alpha": 8}')
    return root


@pytest.mark.parametrize(
    ("command", "given", "code", "hint"),
    [
        ("hf-to-mcore", "mcore", 4, "mbx convert mcore-to-hf mcore"),
        ("hf-to-mcore", "lora", 4, "mbx convert adapter-to-mcore lora"),
        ("hf-to-mcore", "hf/config.json", 4, "is a file"),
        ("mcore-to-hf", "hf", 4, "mbx convert hf-to-mcore hf"),
        ("mcore-to-hf", "lora", 4, "mbx convert adapter-to-mcore lora"),
        ("mcore-to-hf", "hf/config.json", 4, "is a file"),
        ("reshard", "hf", 4, "mbx convert hf-to-mcore hf"),
        ("reshard", "empty", 4, "no Hugging Face folder either"),
        ("adapter-to-mcore", "hf", 4, "is a Hugging Face model, no adapter"),
        ("adapter-to-mcore", "mcore", 2, "is no PEFT folder"),
        ("adapter-to-hf", "hf", 4, "is a Hugging Face model, no adapter"),
        ("adapter-to-hf", "mcore", 4, "holds no adapter"),
        ("adapter-to-hf", "lora", 2, "mbx convert adapter-to-mcore lora"),
    ],
)
def test_a_source_of_another_kind(
    mbx: Run, kinds: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: str, code: int, hint: str
) -> None:
    monkeypatch.chdir(kinds)
    said = mbx("convert", command, given, "new")
    assert (said.code, said.stdout) == (code, "")
    assert hint in said.stderr and "Errno" not in said.stderr
    assert not (kinds / "new").exists()


@pytest.mark.parametrize(
    ("base", "adapter", "words"),
    [
        ("lora", "hf", "the model that it adapts was expected"),
        ("empty", "lora", "is no model"),
        ("hf", "hf", "no adapter"),
        ("hf", "mcore", "holds no adapter"),
    ],
)
def test_a_merge_of_the_wrong_folders(
    mbx: Run, kinds: Path, monkeypatch: pytest.MonkeyPatch, base: str, adapter: str, words: str
) -> None:
    monkeypatch.chdir(kinds)
    said = mbx("convert", "merge", base, adapter, "new")
    assert said.code == 4 and words in said.stderr
    assert not (kinds / "new").exists()


def test_a_layout_for_a_hugging_face_result(mbx: Run, kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kinds)
    said = mbx("convert", "merge", "hf", "lora", "new", "--tp", 2)
    assert said.code == 2 and "--to mcore" in said.stderr


def test_a_reference_without_config_is_not_passed_over(mbx: Run, kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kinds)
    said = mbx("convert", "mcore-to-hf", "mcore", "new", "--hf-config", "empty")
    assert said.code == 4 and "`empty` has no `config.json`" in said.stderr
    assert mbx("convert", "mcore-to-hf", "mcore", "new", "--hf-config", "hf", "--dry-run").code == 0


def test_integrity_of_a_file(mbx: Run, kinds: Path) -> None:
    said = mbx("verify", "integrity", kinds / "hf" / "config.json")
    assert said.code == 4 and "Errno" not in said.stderr
