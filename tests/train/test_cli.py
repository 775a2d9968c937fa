"""`mbx train` and `mbx budget` from the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _trainings import QWEN3, ROOT

from mbx.cli import main

RECIPE = ["--recipe", "qwen3_0_6b_sft", f"model={QWEN3}", "data.length=64", "run.device=cpu", "train.precision=fp32"]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    lines = [
        {"messages": [{"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": f"{n} {n + 1}"}]}
        for n in range(8)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"data={tmp_path / 'd.jsonl'}"


def small(tmp_path: Path, chats: str) -> list[str]:
    return [
        *RECIPE,
        chats,
        f"run.dir={tmp_path / 'run'}",
        "train.steps=3",
        "train.global_batch=2",
    ]


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


def test_from_a_folder_to_a_folder(tmp_path: Path, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = small(tmp_path, chats)
    assert main(["train", *arguments, "--json"]) == 0
    assert document(capsys)["steps"] == 3
    run = str(tmp_path / "run")
    assert main(["train", "export", run, str(tmp_path / "hf"), "--json"]) == 0
    assert document(capsys)["kind"] == "Hugging Face model"
    assert main(["train", "export", run, str(tmp_path / "hf")]) == 2
    assert "hint: name a new folder" in capsys.readouterr().err  # export has no --overwrite
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (QWEN3 / "tokenizer.json").read_bytes()
    assert main(["train", "report", run]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main(["train", *arguments, "--resume", "train.steps=4", "--json"]) == 0
    assert document(capsys)["steps"] == 4


def test_dry_run_writes_nothing(tmp_path: Path, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = small(tmp_path, chats)
    assert main(["train", *arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"weights from {QWEN3}" in text and "3 steps of 2 x 64 tokens in fp32" in text and "total" in text
    assert main(["train", *arguments, "--dry-run", "--json"]) == 0
    assert document(capsys)["memory_total_bytes"] > 0  # type: ignore[operator]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "no recipe is named"),
        (["train", "--recipe", "qwen3_0_6b_stf"], 2, "qwen3_0_6b_sft"),
        (["train", "--recipe", "qwen3_0_6b_sft", "trian.steps=1"], 2, "train.steps"),
        (["train", "--recipe", "qwen3_0_6b_sft"], 2, "model=DIR"),
        (["train", *RECIPE, "data=/nowhere.jsonl"], 4, "/nowhere.jsonl"),
        (["train", *RECIPE, "--init-from", "/nowhere"], 4, "/nowhere"),
        (["train", *RECIPE, "--resume"], 4, "no checkpoint"),
        (["train", *RECIPE, "fp8.recipe=delayed", "train.precision=bf16"], 5, "needs a GPU"),
        (["train", *RECIPE, "fp8.recipe=mxfp8", "train.precision=bf16"], 5, "fp8.recipe=mxfp8"),
        (["train", *RECIPE, "fp8.recipe=nvfp4", "train.precision=bf16", "--dry-run"], 5, "capability 10.0 to 11.0"),
        (["train", *RECIPE, "data.length=1024"], 2, "exceeds the model's 512 positions"),
        (["train", *RECIPE, "parallel.tp=3"], 2, "parallel.tp 3 does not divide num_attention_heads"),
        (["train", *RECIPE, "parallel.pp=2", "parallel.vpp=8"], 2, "layers"),
        (["train", *RECIPE, "parallel.cp=2", "data.pack=false", "--dry-run"], 5, "parallel.cp=2 needs"),
        (["train", *RECIPE, "model.config.gradient_accumulation_fusion=true"], 5, "Apex"),
        (["train", *RECIPE, "optim.warmup_steps=600"], 2, "optim.warmup_fraction"),
        (["train", *RECIPE, "parallel.tp=2"], 2, "torchrun --nproc-per-node 2"),
        (["train", "export", "/nowhere"], 2, "export RUN DST"),
        (["train", "export", "/nowhere", "/nowhere2"], 2, "no checkpoint"),
        (["train", "report", "/nowhere"], 4, "metrics.jsonl"),
        (["train", "export", "/nowhere", "/nowhere2", "--dry-run"], 2, "takes no --dry-run"),
        (["train", "report", "/nowhere", "--resume"], 2, "takes no --resume"),
        (["train", *RECIPE, "--merged"], 2, "--merged is for"),
    ],
)
def test_failures(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_has_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n{"messages": 3}\n')
    assert main(["train", *RECIPE, f"data={tmp_path / 'd.jsonl'}", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "d.jsonl:2: `messages` must be a non-empty list" in capsys.readouterr().err


def test_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--recipe", "llama3_8b_lora", "lora.rank=64", "--json"]) == 0
    found = document(capsys)
    assert found["adapters"] == 167_772_160
    assert sum(found["bytes"].values()) == found["total_bytes"]  # type: ignore[attr-defined]
    assert main(["budget", "--recipe", "llama3_8b_sft", "--world-size", "3", "parallel.tp=2"]) == 2
    for none in ("0", "-1"):
        assert main(["budget", "--recipe", "llama3_8b_sft", "--world-size", none]) == 2
        assert "at least one process" in capsys.readouterr().err


@pytest.mark.parametrize("verbose", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_notices_of_libraries_are_for_those_who_ask(tmp_path: Path, chats: str, verbose: bool) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "mbx", "train", *small(tmp_path, chats), *(["-v"] if verbose else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("Warning" in said.stderr) is verbose and "step 3/3" in said.stderr


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list", "--json"]) == 0
    names = [recipe["name"] for recipe in document(capsys)["recipes"]]  # type: ignore[attr-defined]
    assert {"llama32_1b_lora", "llama3_70b_sft", "qwen3_32b_dora", "vanilla_gpt"} <= set(names)
    assert main(["train", "--recipe", "llama32_1b_lora", "--show", "lora.rank=3"]) == 0
    assert "rank = 3" in capsys.readouterr().out


def test_what_show_prints_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from mbx.train.recipe.catalogue import load_recipe

    main(["train", "--recipe", "llama32_1b_lora", "--show"])
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "mine.toml")) == replace(load_recipe("llama32_1b_lora"))


def test_torchrun_on_two_processes(tmp_path: Path, chats: str) -> None:
    """The module runs under torchrun, and only rank 0 speaks."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "-m", "mbx"]
    command += ["train", *small(tmp_path, chats), "parallel.tp=2", "model.vocab_divisor=2"]
    if shutil.which(command[0]) is None:
        pytest.skip("torchrun is not beside this Python")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished") == 1
    assert done.stderr.count("step 3/3") == 1


def test_import_is_light() -> None:
    code = "import sys; import mbx.cli; assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
