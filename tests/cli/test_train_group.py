"""`mbx train` is a command and a group: which words are a command's, and which are overrides."""

from __future__ import annotations

import pytest
import typer
from _cli import Run

from mbx.cli import train


@pytest.mark.parametrize("before", [(), ("--json",), ("-q", "--json")])
def test_options_may_stand_before_a_command(mbx: Run, before: tuple[str, ...]) -> None:
    said = mbx("train", *before, "report", "/nowhere", *(() if before else ("--json",)))
    assert said.code == 4 and "metrics.jsonl" in said.document["error"]["fact"]


@pytest.mark.parametrize("words", [("lora.rank=3", "--show"), ("--show", "lora.rank=3")])
def test_overrides_may_stand_anywhere(mbx: Run, words: tuple[str, ...]) -> None:
    assert mbx("train", *words, "--recipe", "llama32_1b_lora", "--json").document["lora"]["rank"] == 3


def test_an_override_is_no_command_whatever_its_key(mbx: Run) -> None:
    said = mbx("train", "--recipe", "llama32_1b_lora", "report=1")
    assert said.code == 2 and "a recipe has no key `report`" in said.stderr


def test_a_word_like_a_command_is_met_with_it(mbx: Run) -> None:
    said = mbx("train", "exprt", "run")
    assert said.code == 2 and "'export'" in said.stderr


def test_an_option_of_the_other_is_named(mbx: Run) -> None:
    assert "`mbx train report` takes no --resume" in mbx("train", "--resume", "report", "run").stderr
    assert "hint: mbx train export RUN DST" in mbx("train", "export").stderr


def test_a_command_more_is_a_function_more(mbx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.app, "registered_commands", list(train.app.registered_commands))

    @train.app.command("matrix")
    def matrix(size: int) -> None:
        raise typer.Exit(size)

    assert mbx("train", "matrix", "3").code == 3 and "matrix" in mbx("train", "--help").stdout
