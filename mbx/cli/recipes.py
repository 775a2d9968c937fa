"""The recipe that a command's words name, and what completes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from converters.errors import UsageError
from mbx.cli import completions

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME", help="A shipped recipe's name or a .toml file.", autocompletion=completions.recipes
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="The recipe, and overrides of its keys.",
        autocompletion=completions.recipe_words,
    ),
]


def named(recipe: str | None, words: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe of `--recipe` or of the first word, and the overrides; UsageError where none or two are named."""
    first = words[0] if words and "=" not in words[0] else None
    if recipe is None and first is None:
        raise UsageError(
            "no recipe is named", hint="mbx train --list shows them; `mbx train NAME` or ‹recipe› NAME takes one"
        )
    if recipe is not None and first is not None:
        raise UsageError(f"two recipes are named, `{recipe}` and `{first}`", hint="overrides are KEY=VALUE")
    return (recipe, list(words)) if recipe is not None else (str(first), list(words[1:]))
