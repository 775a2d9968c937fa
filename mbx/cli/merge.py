"""`mbx convert merge`: a base model and an adapter become one model."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.convert import app
from mbx.cli.groups import grouped
from mbx.cli.layout_options import LayoutOptions
from mbx.cli.options import AllowUnusedKey, Mapping, Output, epilog
from mbx.cli.push import Pushing
from mbx.cli.running import Running, carry_out

__all__ = ["app", "merge"]


class Kind(str, Enum):
    """Kinds of model."""

    hf = "hf"
    mcore = "mcore"


@app.command(
    "merge",
    epilog=epilog(
        "mbx convert merge ./llama ./lora ./merged",
        "mbx convert merge meta-llama/Llama-3.2-1B ./lora ckpt --to mcore --tp 2",
        "mbx convert merge ckpt lora-mcore merged-ckpt --tp 2",
    ),
)
@grouped
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder, hub model org/name or checkpoint.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or a checkpoint of adapters.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[Kind | None, typer.Option("--to", help="What to make (default: what the base is).")] = None,
    *,
    layout: LayoutOptions,
    mapping: Mapping = None,
    allow_unused_key: AllowUnusedKey = None,
    running: Running,
    pushing: Pushing,
    output: Output,
) -> None:
    """Merge an adapter into its base.

    Adapted weights are computed in fp32 and rounded once to the base's dtype, as PEFT's merge of an fp32 model is;
    all others move as bytes. An adapter tensor that matches nothing in the base is an error.
    """
    output.configure()
    from mbx.cli.source import fetch
    from mbx.run.merge import plan_merge

    options = replace(
        running.options(mapping), layout=layout.layout(), allow_unused_keys=tuple(allow_unused_key or ())
    )
    pushing.check()
    source = fetch(base).path
    carry_out(lambda: plan_merge(source, adapter, dst, options, to=to and to.value), running.dry_run)
    if not running.dry_run:
        pushing.after(dst)
