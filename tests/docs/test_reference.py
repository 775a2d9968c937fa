"""The reference says what the code says, of every command, key and name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from _pages import ROOT

import mbx
from mbx.cli import app
from mbx.train.recipe.parse import all_keys
from pages import commands, python_names, recipe_keys

REFERENCE = ROOT / "docs" / "reference"


@pytest.mark.parametrize(
    ("name", "write"),
    [("commands", commands.page), ("recipe-keys", recipe_keys.page), ("python", python_names.page)],
)
def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[], str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert (REFERENCE / f"{name}.md").read_text(encoding="utf-8") == write(), "the page is stale: run `make docs`"


def test_every_command_and_option_is_on_its_page() -> None:
    text = (REFERENCE / "commands.md").read_text(encoding="utf-8")

    def walk(command: object, path: str) -> None:
        assert f" {path}\n" in text
        for param in getattr(command, "params", ()):
            assert [option for option in param.opts if option.startswith("--") and option not in text] == [], path
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}")

    walk(typer.main.get_command(app), "mbx")


def test_every_key_has_a_meaning_and_no_other_has() -> None:
    assert set(recipe_keys.meanings()) == set(all_keys())


def test_a_name_without_a_docstring_is_refused() -> None:
    def bare() -> None: ...

    with pytest.raises(ValueError, match="no docstring"):
        list(python_names._name("mbx", "bare", bare))


def test_every_public_name_is_on_its_page() -> None:
    text = Path(REFERENCE / "python.md").read_text(encoding="utf-8")
    assert [name for name in mbx.__all__ if not name.startswith("__") and f"### mbx.{name}\n" not in text] == []
