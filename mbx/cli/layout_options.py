"""Options that describe a parallel layout and a Megatron format, the same for every command that writes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli import completions

if TYPE_CHECKING:
    from converters.mcore.layout import Layout


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
ModelClass = Annotated[
    str | None,
    typer.Option(
        "--model-class",
        metavar="<Class>",
        help="gpt or hybrid: the class that loads it.",
        autocompletion=completions.model_classes,
    ),
]
Flavour = Annotated[
    str | None,
    typer.Option(
        "--flavour",
        metavar="<Flavour>",
        help="bridge, mcore-bridge, …: whose names and order; text: no towers.",
        autocompletion=completions.flavours,
    ),
]
ToFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="<Format>",
        help="torch_dist; torch: mp_rank_* files; fsdp_dtensor: Megatron-FSDP's.",
        autocompletion=completions.formats,
    ),
]


@dataclass(frozen=True)
class LayoutOptions:
    """The parallel sizes of a checkpoint to write."""

    tp: Tp = 1
    pp: Pp = 1
    vpp: Vpp = 1
    ep: Ep = 1
    etp: Etp = None
    pipeline_layout: Pipeline = None
    decoder_first_pipeline_num_layers: FirstStage = None
    decoder_last_pipeline_num_layers: LastStage = None

    def layout(self, vocab_divisor: int = 1) -> Layout:
        """The same as a `Layout`, the vocabulary padded to a multiple of `vocab_divisor` x TP rows."""
        from converters.mcore.layout import Layout

        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        return Layout(self.tp, self.pp, vocab_divisor, self.vpp, self.ep, self.etp, self.pipeline_layout, first, last)
