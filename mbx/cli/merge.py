"""`mbx convert merge`: a base model and an adapter become one model."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.convert import app
from mbx.cli.layout_options import Ep, Etp, FirstStage, LastStage, Pipeline, Pp, Tp, Vpp
from mbx.cli.options import Json, Mapping, MaxMemory, Quiet, Verbose, Workers, epilog
from mbx.cli.running import DryRun, NoSync, Overwrite, Resume, carry_out, running
from mbx.output import out

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
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder, hub model org/name or checkpoint.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or a checkpoint of adapters.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[Kind | None, typer.Option("--to", help="What to make (default: what the base is).")] = None,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    ep: Ep = 1,
    etp: Etp = None,
    pipeline_layout: Pipeline = None,
    decoder_first_pipeline_num_layers: FirstStage = None,
    decoder_last_pipeline_num_layers: LastStage = None,
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
    """Merge an adapter into its base.

    Adapted weights are computed in fp32 and rounded once to the base's dtype, as PEFT's merge of an fp32 model is;
    all others move as bytes. An adapter tensor that matches nothing in the base is an error.
    """
    out.configure(json=json, quiet=quiet, verbose=verbose)
    from converters.layout import Layout
    from mbx.adapters.merge import plan_merge
    from mbx.cli.source import fetch

    first, last = decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers
    run = running(mapping, workers, max_memory, overwrite=overwrite, resume=resume, no_sync=no_sync)
    options = replace(run, layout=Layout(tp, pp, 1, vpp, ep, etp, pipeline_layout, first, last))
    source = fetch(base).path
    carry_out(lambda: plan_merge(source, adapter, dst, options, to=to and to.value), dry_run)
