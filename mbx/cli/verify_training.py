"""`mbx verify training`: whether a recipe learns what Transformers would."""

from __future__ import annotations

import textwrap
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out, paint
from mbx.cli.recipes import RecipeName, Words, named
from mbx.cli.verify import app
from mbx.extras import require
from mbx.text import screen_width

if TYPE_CHECKING:
    from mbx.train.proof.training import Report

__all__ = ["app", "training"]


class Excusable(str, Enum):
    """Legs that some data or some recipes have nothing for."""

    mask = "mask"
    micro_batch = "micro-batch"
    packing = "packing"


_SHOWN, _INDENT = 6, 22
_COLOURS = {"passed": "green", "failed": "red", "not run": "yellow"}


@app.command(
    "training",
    epilog=epilog(
        "mbx verify training --recipe llama32_1b_lora model=DIR data=chat.jsonl",
        "mbx verify training --recipe mine.toml --records 32 --json",
        "torchrun --nproc-per-node 2 -m mbx verify training --recipe mine.toml",
    ),
)
@grouped
def training(
    words: Words = None,
    recipe: RecipeName = None,
    records: Annotated[int, typer.Option(min=1, metavar="N", help="Look at the first N records of the data.")] = 8,
    allow_not_run: Annotated[
        list[Excusable] | None,
        typer.Option("--allow-not-run", metavar="LEG", help="mask, micro-batch or packing need not run; repeatable."),
    ] = None,
    *,
    output: Output,
) -> None:
    """Run a recipe's first records through Megatron Core and through Transformers by themselves, and compare.

    Compared are tokens, mask, loss, every parameter's gradient under its Hugging Face name (an adapter's under
    PEFT's), one optimizer step; and what must change nothing: longer rows, other labels where none is learned, another
    micro-batch, packing, a learning rate of 0. In fp32, without dropout. Both models are whole in memory. Exit code 1
    unless every leg ran and passed.
    """
    output.configure()
    output.hush()
    require("train", "`mbx verify training`")
    from mbx.cli.train import fetched
    from mbx.train.proof.training import verify_training
    from mbx.train.recipe.catalogue import load_recipe

    excused = [leg.value for leg in allow_not_run or ()]
    report = verify_training(fetched(load_recipe(*named(recipe, words or []))), records, excused)
    if report is None:  # rank 0 has it
        raise typer.Exit(0)
    out.result(_document(report), lambda: _lines(report))
    raise typer.Exit(0 if report.passed else 1)


def _document(report: Report) -> dict[str, Any]:
    legs = {
        leg.name: {"status": leg.status, "summary": leg.summary, "details": list(leg.details)} for leg in report.legs
    }
    return {"passed": report.passed, "recipe": report.recipe, "compared": report.what, "legs": legs}


def _lines(report: Report) -> list[str]:
    lines = [f"{report.recipe}: {report.what}"]
    for leg in report.legs:
        head = f"{leg.name:<12} {paint(leg.status, _COLOURS[leg.status])}"
        first, *more = textwrap.wrap(leg.summary, screen_width() - _INDENT)
        lines.append(f"{head}{' ' * (_INDENT - 13 - len(leg.status))}{first}")
        lines += [" " * _INDENT + line for line in more]
        for detail in leg.details[:_SHOWN]:
            lines += [
                " " * _INDENT + line
                for line in textwrap.wrap(detail, screen_width() - _INDENT, break_long_words=False)
            ]
        if len(leg.details) > _SHOWN:
            lines.append(f"{' ' * _INDENT}… and {len(leg.details) - _SHOWN} more (--json has all)")
    idle = [leg.name for leg in report.legs if leg.status == "not run"]
    if any(leg.status == "failed" for leg in report.legs):
        return [*lines, paint("the training differs", "red")]
    if not report.passed:
        named = " ".join(f"--allow-not-run {name}" for name in idle)
        return [*lines, paint(f"not proven: {', '.join(idle)} did not run ({named} passes without)", "red")]
    return [*lines, paint("passed" + (f", {', '.join(idle)} not run" if idle else ""), "green")]
