"""`mbx convert reshard`: another layout or format of a Megatron checkpoint."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli.convert import app
from mbx.cli.groups import grouped
from mbx.cli.imports import import_numpy
from mbx.cli.layout_options import LayoutOptions, ModelClass, ToFormat
from mbx.cli.options import Mapping, Output, epilog
from mbx.cli.running import Running, carry_out

if TYPE_CHECKING:
    from converters.mcore.local import Spec

__all__ = ["app", "reshard"]


class LayerSpec(str, Enum):
    """Whose names a legacy checkpoint uses."""

    transformer_engine = "transformer_engine"
    local = "local"


@app.command(
    "reshard",
    epilog=epilog(
        "mbx convert reshard ckpt ckpt-tp4 --tp 4 --pp 2",
        "mbx convert reshard legacy ckpt",
        "mbx convert reshard ckpt legacy --format torch --tp 8 --ep 4 --etp 1",
    ),
)
@grouped
def reshard(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Megatron checkpoint, or one iter_* folder of it.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint folder to make.")],
    format: ToFormat = "torch_dist",
    model_class: ModelClass = None,
    *,
    layout: LayoutOptions,
    make_vocab_size_divisible_by: Annotated[
        int | None, typer.Option(metavar="N", help="Pad the vocabulary to a multiple of N x TP (default: as SRC).")
    ] = None,
    transformer_impl: Annotated[
        LayerSpec, typer.Option(help="Whose names --format torch uses.", show_choices=False)
    ] = LayerSpec.transformer_engine,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Take the optimizer's state along, torch_dist to torch_dist.")
    ] = False,
    mapping: Mapping = None,
    running: Running,
    output: Output,
) -> None:
    """Change the layout or format of a Megatron checkpoint, values untouched.

    Weights only, unless --with-optimizer is given; other state in SRC is reported and not carried.
    """
    output.configure()
    import_numpy()
    from mbx.run.reshard import plan_mcore_to_mcore

    divisor = make_vocab_size_divisible_by
    options = replace(running.options(mapping), layout=layout.layout(divisor or 1), format=format)
    options = replace(options, model_class=model_class)
    spec: Spec = "local" if transformer_impl is LayerSpec.local else "transformer_engine"
    carry_out(
        lambda: plan_mcore_to_mcore(
            src, dst, options, vocab_divisor=divisor, spec=spec, with_optimizer=with_optimizer
        ),
        running.dry_run,
    )
