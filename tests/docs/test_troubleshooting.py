"""Every message that the troubleshooting page explains is one that the code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from _pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### (.+)$", PAGE, re.M)
#: Shorter ones would fit anything.
_LETTERS = 12


def _text(node: ast.expr) -> str | None:
    """A string of the code, `…` for what is put in; None for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(_text(side) or "…" for side in (node.left, node.right))
    return None


@cache
def said_by_the_code() -> tuple[str, ...]:
    def walk() -> Iterator[str]:
        for package in ("mbx", "converters"):
            for path in (ROOT / package).rglob("*.py"):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    text = _text(node) if isinstance(node, ast.expr) else None
                    if text and len(re.sub(r"[^a-zA-Z]", "", text)) >= _LETTERS:
                        yield plain(text)

    return tuple(dict.fromkeys(walk()))


def plain(text: str) -> str:
    """Without the marks around names, and as a reader sees a choice."""
    return re.sub(r"‹([\w-]+)›", r"--\1", text).replace("`", "").strip()


def known(message: str) -> bool:
    """Whether the code says it: between `…` of either, the same words in the same order."""
    wanted = [part for part in re.split(r"…+", plain(message)) if part.strip(" :,")]
    return any(_in_order(wanted, text) for text in said_by_the_code())


def _in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        at = text.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_it(message: str) -> None:
    assert known(message)


def test_another_message_is_not_known() -> None:
    assert len(MESSAGES) > 20
    assert not known("this layout does fit the model: …")
    assert not known("… needs the parallel sizes of … and nothing else")
    assert known("the destination … is not empty") and not known("is not empty the destination …")


def test_hints_of_the_page_are_options_and_files_that_are_there() -> None:
    """What stands in backquotes and begins with dashes is an option of some command."""
    options = (ROOT / "fixtures" / "golden" / "help" / "options.txt").read_text(encoding="utf-8")
    named = set(re.findall(r"`(--[\w-]+)", PAGE))
    assert named and [option for option in named if option not in options] == []
