"""What people type who come from other tools: understood, or answered with what it is called here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _cli import TINY, Run

from mbx.cli.progress import Meter

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("verify a b", "`mbx verify parity A B`"),
        ("convert a b", "`mbx convert hf-to-mcore HF CKPT`"),
        ("reshard a b", "it is `mbx convert reshard`"),
        ("parity a b", "it is `mbx verify parity`"),
        ("convert hf-to-mcore a b --dtype bfloat16", "`bf16` is what it is called here"),
        ("convert hf-to-mcore a b --dtype torch.float32", "`fp32` is what it is called here"),
        ("convert hf-to-mcore a b --torch-dtype bf16", "--dtype is what it is called here"),
        ("convert hf-to-mcore a b --tensor-parallel 2", "--tp is what it is called here"),
        ("convert hf-to-mcore a b --tensor-model-parallel-size 2", "--tp is what it is called here"),
        ("convert hf-to-mcore a b --expert-model-parallel-size 2", "--ep is what it is called here"),
        ("convert reshard a b --target-pipeline-parallel-size 2", "--pp is what it is called here"),
        ("train", "`mbx train NAME`"),
        ("train llama32_1b_lora --recipe qwen3_8b_lora", "KEY=VALUE"),
    ],
)
def test_the_hint_says_what_it_is_called_here(mbx: Run, line: str, hint: str) -> None:
    said = mbx(*line.split())
    assert said.code == 2 and hint in " ".join(said.stderr.split())


def test_every_synonym_leads_to_an_option_or_value_that_is_there(mbx: Run) -> None:
    from mbx.cli.synonyms import OPTIONS, VALUES

    text = "".join(
        mbx(*command.split(), "--help").stdout for command in ("convert hf-to-mcore", "convert reshard", "train")
    )
    words = {word for word in OPTIONS.values() if word.startswith("--")} | set(VALUES.values())
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("command", ["train", "budget"])
def test_the_first_word_is_the_recipe(mbx: Run, command: str) -> None:
    model = f"model={TINY / 'llama'}"
    dry = ("--show",) if command == "train" else ()
    one, other = (
        mbx(command, *words, model, *dry, "--json")
        for words in (("llama32_1b_lora",), ("--recipe", "llama32_1b_lora"))
    )
    assert one.code == other.code == 0 and one.document == other.document


def test_a_folder_is_budgeted_by_a_method(mbx: Run) -> None:
    assert mbx("budget", TINY / "llama", "--method", "sft", "--json").document["adapters"] == 0


@pytest.mark.parametrize("method", ["lora", "dora", "sft", "pretrain"])
def test_the_methods_that_complete_are_those_that_are_there(mbx: Run, method: str) -> None:
    from mbx.cli.completions import methods

    assert method in methods("")
    assert mbx("budget", TINY / "llama", "--method", method, "--json").code == 0


def test_mbx_alone_is_a_start(mbx: Run) -> None:
    said = mbx()
    assert said.code == 0 and "Examples:" in said.stdout and not said.stderr
    assert mbx("--no-such").code == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mbx train --recipe gemma3_1b_l", "gemma3_1b_lora"),
        ("mbx train gemma3_1b_l", "gemma3_1b_lora"),
        ("mbx budget qwen3_8b_s", "qwen3_8b_sft"),
        ("mbx models show gemma3", "gemma3_text"),
        ("mbx verify parity a b --mapping olmo2", "olmo2"),
        ("mbx convert hf-to-mcore a b --dtype bf", "bf16"),
        ("mbx convert reshard a b --format torch_", "torch_dist"),
        ("mbx convert hf-to-mcore a b --flavour mc", "mcore-bridge"),
        ("mbx convert hf-to-mcore a b --flavour bridge-", "bridge-0.3"),
        ("mbx convert hf-to-mcore a b --model-class h", "hybrid"),
        ("mbx models check glm4_moe_l", "glm4_moe_lite"),
        ("mbx train llama32_1b_lora train.rec", "train.recompute="),
        ("mbx budget qwen3_8b_sft --device rtx-", "rtx-pro-6000"),
        ("mbx budget folder --method s", "sft"),
        ("mbx train export m", "mine"),
        ("mbx report runs/", "runs/one"),
    ],
)
def test_the_shell_completes(line: str, found: str, tmp_path: Path) -> None:
    for run in ("mine", "runs/one"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "metrics.jsonl").touch()
    (tmp_path / "runs" / "none").mkdir()
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_MBX_COMPLETE": "complete_bash"}
    run = [sys.executable, "-c", "from mbx.cli import main; main()"]
    said = subprocess.run(run, env={**os.environ, **words}, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found in said.stdout.split() and "runs/none" not in said.stdout, said.stderr


def test_a_comparison_says_how_much_is_left() -> None:
    meter = Meter("comparing", None)
    meter.expect(600)
    meter.advance(300)
    meter.expect(600)
    assert "300 B of 1.20 kB (25%)" in meter.line() and "s left" in meter.line()


def test_a_class_around_a_known_text_model_is_told_as_that(mbx: Run, here: Path) -> None:
    folder = here / "novel"
    shutil.copytree(TINY / "llama", folder)
    text = json.loads((folder / "config.json").read_text())
    config = {"architectures": ["NovelForConditionalGeneration"], "model_type": "novel_vl", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    said = mbx("convert", "hf-to-mcore", "novel", "out", "--dry-run")
    assert said.code == 3 and "near:" not in said.stderr
    assert "no table for NovelForConditionalGeneration around a 'llama' text model" in said.stderr
    assert "the table `llama` covers that text model" in said.stderr


@pytest.mark.parametrize(
    "launch", [["-m", "mbx"], ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "mbx"]]
)
def test_it_starts_in_the_folder_above_a_clone_of_its_name(here: Path, launch: list[str]) -> None:
    (here / "mbx").symlink_to(ROOT)
    command = [sys.executable, *launch, "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0 and said.stdout.startswith("mbx "), said.stderr
