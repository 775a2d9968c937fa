"""Every command line, Python block and file of settings that a page shows is one that this version takes."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
import yaml
from _command_line import fault
from _pages import blocks, command_lines, named, pages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = pages()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_line_is_taken(page: Path) -> None:
    faults = {place: said for block in blocks(page) for place, words in command_lines(block) if (said := fault(words))}
    assert faults == {}


def test_the_pages_have_command_lines() -> None:
    found = [words for page in PAGES for block in blocks(page) for _, words in command_lines(block)]
    assert len(found) > 100 and {words[0] for words in found} >= {"mbx", "torchrun", "python", "make", "pip"}


@pytest.mark.parametrize(
    "line",
    [
        "mbx convert hf-to-mcore a b --tensor 2",
        "mbx verify a b",
        "mbx convert hf-to-mcore a",
        "mbx convert hf-to-mcore a b --dtype int3",
        "mbx train llama32_1b_lora optim.rate=3",
        "mbx train no_such_recipe",
        "torchrun --nproc-per-node 2 -m mbx train --recipe NAME parallel.tp=x",
        "python -m benchmarks.no_such",
        "python benchmarks/no_such.py",
        "make no-such",
        "pip install '.[no-such]'",
        "pip install numpy",
        "docker build -f docker/no_such .",
        "pytest tests/no_such",
        "wget nothing",
    ],
)
def test_a_wrong_line_is_seen(line: str) -> None:
    import shlex

    assert fault(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_other_block_is_well_formed(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            tree = ast.parse(block.text, block.place)
            assert _unknown_of_live(tree) == [], block.place
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def _unknown_of_live(tree: ast.AST) -> list[str]:
    """Methods and arguments that a block asks of an attached model, by the name `live`, and that it does not have."""
    from mbx.live import Live

    unknown = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func
        if not (isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id == "live"):
            continue
        method = getattr(Live, name.attr, None)
        taken = inspect.signature(method).parameters if method else {}
        unknown += [] if method else [name.attr]
        unknown += [f"{name.attr}({word.arg}=)" for word in call.keywords if method and word.arg not in taken]
    return unknown


def test_an_unknown_method_of_a_live_model_is_seen() -> None:
    assert _unknown_of_live(ast.parse("live.exports()")) == ["exports"]
    assert _unknown_of_live(ast.parse("live.export(bucket=1, size=2)")) == ["export(size=)"]


def test_blocks_are_found_in_either_form(tmp_path: Path) -> None:
    text = "<!-- not run: no GPU -->\n```sh\nmbx a \\\n  b  # c\n```\n\n    mbx c | jq\n    make d > e\n\n"
    text += "```python\nx\n```\n"
    made = tmp_path / "page.md"
    made.write_text(text)
    found = blocks(made)
    assert [(b.language, b.not_run) for b in found] == [("sh", "no GPU"), ("", ""), ("", ""), ("python", "")]
    assert [words for b in found for _, words in command_lines(b)] == [["mbx", "a", "b"], ["mbx", "c"], ["make", "d"]]
