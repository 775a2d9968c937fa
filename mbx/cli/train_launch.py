"""`mbx train --launch`: how to start a run on several GPUs or nodes, as text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from converters.errors import UsageError
from mbx.cli.output import out

if TYPE_CHECKING:
    from mbx.train.recipe.sections import Recipe


class Launcher(str, Enum):
    """Who starts the processes."""

    torchrun = "torchrun"
    slurm = "slurm"


@dataclass(frozen=True)
class Launch:
    """On what a run is to be started."""

    launch: Annotated[
        Launcher | None, typer.Option("--launch", help="Print how to start the run on several GPUs or nodes.")
    ] = None
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="Nodes to launch on.")] = 1
    gpus: Annotated[
        int | None,
        typer.Option("--gpus-per-node", metavar="N", min=1, help="GPUs of a node (default: as few as the axes take)."),
    ] = None
    restarts: Annotated[
        int, typer.Option("--max-restarts", metavar="N", min=0, help="Start again so often when processes die.")
    ] = 0

    def check(self) -> None:
        """UsageError where machines are named that nothing is launched on."""
        for word, given in (("nodes", self.nodes > 1), ("gpus-per-node", self.gpus), ("max-restarts", self.restarts)):
            if given and not self.launch:
                raise UsageError(
                    f"‹{word}› goes with ‹launch›", hint="‹launch› torchrun prints the line to start with"
                )


def show_launch(recipe: Recipe, launch: Launch, words: list[str]) -> None:
    """Print the line or the script that starts `mbx train WORDS`."""
    from mbx.train.recipe.launch import machines_for, slurm_script, torchrun_line

    machines = machines_for(recipe, launch.nodes, launch.gpus, launch.restarts)
    command = ["train", *words]
    if launch.launch is Launcher.slurm:
        text = slurm_script(recipe, command, machines)
    else:
        text = torchrun_line(command, machines, name=recipe.name)
    out.result({"launch": text, "nodes": machines.nodes, "gpus_per_node": machines.gpus}, text.splitlines)
