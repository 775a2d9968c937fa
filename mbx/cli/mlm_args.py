"""`mbx mlm-args`: Megatron-LM's command line as a recipe, and a recipe as a command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out

app = typer.Typer(
    help="Translate Megatron-LM flags to recipe keys and back.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=epilog("mbx mlm-args to-recipe run.sh > mine.toml", "mbx mlm-args from-recipe mine.toml"),
)


@app.command(
    "to-recipe", epilog=epilog("mbx mlm-args to-recipe run.sh > mine.toml", "mbx mlm-args to-recipe - --json")
)
@grouped
def to_recipe(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A script with the command line; - reads stdin.")],
    output: Output,
) -> None:
    """Print the recipe that a Megatron-LM command line means.

    Flags that have no counterpart, and flags that are not known, are listed on stderr.
    """
    output.configure()
    from converters.errors import StorageError
    from mbx.train.recipe import mlm_args
    from mbx.train.recipe.toml import dump_toml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read `{file}`: {error}") from error
    found = mlm_args.to_recipe(text)
    for what, flags in (("skipped", found.skipped), ("not known", found.unknown)):
        for flag in flags:
            out.message(f"{what}: {flag}")
    document = {"recipe": found.result, "skipped": list(found.skipped), "unknown": list(found.unknown)}
    out.result(document, lambda: dump_toml(found.result).splitlines())


@app.command(
    "from-recipe", epilog=epilog("mbx mlm-args from-recipe llama3_8b_sft", "mbx mlm-args from-recipe mine.toml")
)
@grouped
def from_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or .toml file.")],
    output: Output,
) -> None:
    """Print the Megatron-LM flags of a recipe.

    Keys that no flag expresses are listed on stderr.
    """
    output.configure()
    from mbx.train.recipe import mlm_args
    from mbx.train.recipe.catalogue import load_recipe

    found = mlm_args.from_recipe(load_recipe(recipe).to_dict())
    for key in found.skipped:
        out.message(f"skipped: {key}")
    out.result({"flags": list(found.flags), "skipped": list(found.skipped)}, lambda: [" ".join(found.flags)])
