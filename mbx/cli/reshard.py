"""`mbx convert reshard`: another layout or format of a Megatron checkpoint."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli.convert import app
from mbx.cli.layout_options import Ep, Etp, FirstStage, Format, LastStage, Pipeline, Pp, ToFormat, Tp, Vpp
from mbx.cli.lean import import_numpy
from mbx.cli.options import Json, Mapping, MaxMemory, Quiet, Verbose, Workers, epilog
from mbx.cli.running import DryRun, NoSync, Overwrite, Resume, carry_out, running
from mbx.output import out

if TYPE_CHECKING:
    from converters.dialects.local import Spec

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
def reshard(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Megatron checkpoint, or one iter_* folder of it.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint folder to make.")],
    format: ToFormat = Format.torch_dist,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    ep: Ep = 1,
    etp: Etp = None,
    pipeline_layout: Pipeline = None,
    decoder_first_pipeline_num_layers: FirstStage = None,
    decoder_last_pipeline_num_layers: LastStage = None,
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
    workers: Workers = None,
    max_memory: MaxMemory = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_sync: NoSync = False,
    json: Json = False,
    quiet: Quiet = 0,
    verbose: Verbose = 0,
) -> None:
    """Change the layout or format of a Megatron checkpoint, values untouched.

    Weights only, unless --with-optimizer is given; other state in SRC is reported and not carried.
    """
    out.configure(json=json, quiet=quiet, verbose=verbose)
    import_numpy()
    from converters.layout import Layout
    from mbx.reshard import plan_mcore_to_mcore

    layout = Layout(
        tp,
        pp,
        make_vocab_size_divisible_by or 1,
        vpp,
        ep,
        etp,
        pipeline_layout,
        decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers,
    )
    run = running(mapping, workers, max_memory, overwrite=overwrite, resume=resume, no_sync=no_sync)
    options = replace(run, layout=layout, format=format.value)
    spec: Spec = "local" if transformer_impl is LayerSpec.local else "transformer_engine"
    divisor = make_vocab_size_divisible_by
    carry_out(
        lambda: plan_mcore_to_mcore(
            src, dst, options, vocab_divisor=divisor, spec=spec, with_optimizer=with_optimizer
        ),
        dry_run,
    )
