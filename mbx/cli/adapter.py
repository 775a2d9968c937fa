"""`mbx convert adapter-to-mcore` and `adapter-to-hf`: LoRA and DoRA adapters, without their base's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli.convert import app
from mbx.cli.layout_options import Ep, Etp, FirstStage, LastStage, Pipeline, Pp, Tp, Vpp
from mbx.cli.options import Json, Mapping, MaxMemory, Quiet, Verbose, Workers, epilog
from mbx.cli.running import DryRun, NoSync, Overwrite, Resume, carry_out, running
from mbx.output import out

if TYPE_CHECKING:
    from mbx.adapters.folder import Base

__all__ = ["BaseModel", "adapter_to_hf", "adapter_to_mcore", "app", "find_base"]

BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="The adapter's base, any kind; what the adapter names if not given."),
]


@app.command(
    "adapter-to-mcore",
    epilog=epilog(
        "mbx convert adapter-to-mcore ./lora lora-mcore --base ./llama --tp 2",
        "mbx convert adapter-to-mcore ./lora lora-mcore --base ckpt --fused",
    ),
)
def adapter_to_mcore(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A PEFT folder: LoRA or DoRA.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint folder to make.")],
    base: BaseModel = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="One A for query, key and value (gate and up), which must be equal.")
    ] = False,
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
    """Convert a PEFT adapter to a Megatron checkpoint of adapters, as Megatron-Bridge names them.

    Of the base only the config is read. Query, key and value keep factors of their own (CanonicalLoRA) unless --fused.
    """
    out.configure(json=json, quiet=quiet, verbose=verbose)
    from converters.layout import Layout
    from mbx.adapters.convert import plan_adapter_to_mcore

    first, last = decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers
    run = running(mapping, workers, max_memory, overwrite=overwrite, resume=resume, no_sync=no_sync)
    options = replace(run, layout=Layout(tp, pp, 1, vpp, ep, etp, pipeline_layout, first, last))
    model = find_base(src, base, mapping)
    carry_out(lambda: plan_adapter_to_mcore(src, dst, options, model, fused=fused), dry_run)


@app.command(
    "adapter-to-hf",
    epilog=epilog(
        "mbx convert adapter-to-hf lora-mcore ./lora",
        "mbx convert adapter-to-hf bridge-lora ./lora --base meta-llama/Llama-3.2-1B",
        "mbx convert adapter-to-hf runs/llama32_1b_lora ./lora --base ./Llama-3.2-1B",
    ),
)
def adapter_to_hf(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Megatron checkpoint of adapters, or a training run.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The PEFT folder to make.")],
    base: BaseModel = None,
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
    """Convert a Megatron checkpoint of adapters to a PEFT folder.

    Reads what mbx, Megatron-Bridge and `mbx train` write. What came from PEFT through mbx comes back byte for byte.
    """
    out.configure(json=json, quiet=quiet, verbose=verbose)
    from mbx.adapters.convert import plan_adapter_to_hf

    options = running(mapping, workers, max_memory, overwrite=overwrite, resume=resume, no_sync=no_sync)
    model = find_base(src, base, mapping)
    carry_out(lambda: plan_adapter_to_hf(src, dst, options, model), dry_run)


def find_base(src: Path, base: str | None, mapping: str | None) -> Base:
    """The base model that is named, or that the adapter names; its config only. UsageError where neither does."""
    from converters.errors import UsageError
    from mbx.adapters.folder import open_base, stated_base
    from mbx.cli.source import fetch

    named = base or stated_base(src)
    if named is None:
        raise UsageError(f"`{src}` does not say which model it adapts", hint="name it: --base DIR")
    return open_base(fetch(named, weights=False).path, mapping)
