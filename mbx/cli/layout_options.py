"""Options that describe a parallel layout and a Megatron format, the same for every command that writes one."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Format(str, Enum):
    """How a Megatron checkpoint is stored."""

    torch_dist = "torch_dist"
    torch = "torch"
    fsdp_dtensor = "fsdp_dtensor"


Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")]
Pp = Annotated[int, typer.Option("--pp", help="Pipeline-parallel size.")]
Vpp = Annotated[int, typer.Option("--vpp", help="Model chunks a pipeline rank holds.")]
Ep = Annotated[int, typer.Option("--ep", help="Expert-parallel size.")]
Etp = Annotated[
    int | None, typer.Option("--etp", show_default=False, help="Tensor-parallel size of experts (default: --tp).")
]
Pipeline = Annotated[
    str | None, typer.Option("--pipeline-layout", metavar="TEXT", help='What each stage holds, as "E|t*5|t*6|t,m,L".')
]
FirstStage = Annotated[
    int | None, typer.Option("--decoder-first-pipeline-num-layers", metavar="N", help="Layers of the first stage.")
]
LastStage = Annotated[
    int | None, typer.Option("--decoder-last-pipeline-num-layers", metavar="N", help="Layers of the last stage.")
]
ToFormat = Annotated[
    Format,
    typer.Option(
        "--format", help="torch_dist; torch: mp_rank_* files; fsdp_dtensor: Megatron-FSDP's.", show_choices=False
    ),
]
