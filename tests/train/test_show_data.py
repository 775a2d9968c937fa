"""`mbx train` says what its data is: examples with what is learned marked, rows, epochs; by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _trainings import QWEN3

from converters.errors import UsageError
from mbx.cli import main
from mbx.train.recipe.catalogue import load_recipe


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    talk = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"conversations": talk}) for _ in range(12)))
    words = [f"model={QWEN3}", f"data={path}", "data.length=64", "run.device=cpu", f"run.dir={tmp_path / 'run'}"]
    return ["train", "--recipe", "qwen3_0_6b_sft", *words]


def test_examples_are_shown(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command, "--show-data", "1"]) == 0
    said = capsys.readouterr().out
    assert "[me</s>]" in said.replace(" ", "") and said.count("chat.jsonl:") == 1 and "epochs" in said
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main([*command, "--show-data"]) == 0
    said = capsys.readouterr().out
    assert said.count("\x1b[32m") == 3 and "[me" not in said
    assert main([*command, "--show-data=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["learned"] for run in found["examples"][0]["runs"]] == [False, True]
    assert (
        len(found["examples"]) == 2 and found["data"]["learned_tokens"] == 12 * found["examples"][0]["learned_tokens"]
    )


def test_epochs_count_the_steps(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "data.pack=false", "train.global_batch=8", "train.epochs=2.5", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["rows"] == 12 and found["recipe"]["train"]["steps"] == 4  # 30 rows, by eights
    assert found["data"]["padding_tokens"] == 12 * 64 - found["data"]["tokens"] + 12
    assert main([*command, "data.pack=false", "train.global_batch=8", "steps=3", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["epochs"] == 2.0


def test_steps_and_epochs_take_each_other_s_place() -> None:
    assert load_recipe("qwen3_0_6b_sft", ["train.epochs=3"]).train.steps == 0
    assert load_recipe("qwen3_0_6b_sft", ["steps=7"]).train.epochs == 0
    with pytest.raises(UsageError, match="both say how long"):
        load_recipe("qwen3_0_6b_sft", ["steps=7", "train.epochs=3"])
    with pytest.raises(UsageError, match="has no epochs"):
        load_recipe("qwen3_0_6b_sft", ["data.kind=pattern", "train.epochs=3"])
