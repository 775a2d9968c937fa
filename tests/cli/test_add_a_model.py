"""docs/add-a-model.md, followed step by step on a checkpoint that no table knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from converters.rows.parse import parse_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-a-model.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The page's indented command lines."""
    return [line.strip() for line in PAGE.split("\n") if line.startswith("       mbx ")]


def novel(tiny: Path, folder: Path) -> None:
    shutil.copytree(tiny / "qwen3", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_every_step_of_the_page_works(tiny: Path, tmp_path: Path) -> None:
    novel(tiny, tmp_path / "novel")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    steps = commands()
    assert [step.split()[1] for step in steps] == ["models", "models", "convert", "convert", "verify"]
    for step in steps:
        line = step.replace("mbx ", f"{sys.executable} -m mbx ", 1)
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
        # the config leg passes, and so must the whole: nothing is left unrun
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"
    for file in (tmp_path / "novel").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_row_the_draft_misses_fails_the_check(tiny: Path, tmp_path: Path) -> None:
    novel(tiny, tmp_path / "novel")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def mbx(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mbx", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    text = mbx("models", "new", "./novel").stdout
    lines = [line for line in text.split("\n") if "k_layernorm" not in line]
    (tmp_path / "novel.toml").write_text("\n".join(lines))
    check = mbx("models", "check", "novel.toml", "--against", "./novel")
    assert check.returncode == 3
    assert "model.layers.0.self_attn.k_norm.weight" in check.stdout


def test_the_grammar_on_the_page_parses() -> None:
    example = PAGE.split("```toml\n")[1].split("```")[0]
    blocks = "\n[rows.moe]\n" + '"mlp.router.weight" = "mlp.gate.weight"\n'
    assert parse_table("page", example + blocks).blocks["attn"]


@pytest.mark.parametrize("word", ["transpose", "optional", "keep_dtype", "same_as", "drop", "hf_gamma"])
def test_every_row_option_is_on_the_page(word: str) -> None:
    assert word in PAGE
