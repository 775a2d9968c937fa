"""How a run is started on several GPUs or nodes: torchrun's line, and a Slurm script around it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from converters.errors import UsageError
from mbx.train.recipe.sections import Recipe
from mbx.train.recipe.world import check_world, smallest_world

#: Where torchrun's agents of several nodes meet, on the first of them.
_PORT = 29500
#: Seconds between Slurm's SIGTERM, on which a run saves and ends, and the end of its time; torchrun gives ranks 30.
_GRACE_S = 120


@dataclass(frozen=True, slots=True)
class Machines:
    """Nodes, GPUs on each of them, and how often a run whose processes died is started again."""

    nodes: int
    gpus: int
    restarts: int


def machines_for(recipe: Recipe, nodes: int, gpus: int | None, restarts: int) -> Machines:
    """`nodes` of `gpus` each, by default as few as the recipe's axes take with tensor parallelism inside a node;
    UsageError where they do not divide."""
    tp = recipe.parallel.tp
    gpus = gpus or tp * -(-smallest_world(recipe) // (nodes * tp))
    check_world(recipe, nodes * gpus)
    if gpus % tp:
        raise UsageError(
            f"tensor parallelism of {tp} would cross nodes of {gpus} GPU(s), at the speed of their network",
            hint=f"a multiple of {tp} GPUs a node, or parallel.tp={gpus}",
        )
    return Machines(nodes, gpus, restarts)


def torchrun_line(
    words: Sequence[str], machines: Machines, *, name: str, head: str = "${HEAD:?the first node}"
) -> str:
    """The line that starts `mbx WORDS` on a node; the same on each of several, where `HEAD` names the first.

    `name` is what the nodes of one run have in common.
    """
    meet = ["--standalone"]
    if machines.nodes > 1:
        meet = ["--nnodes", str(machines.nodes), "--rdzv-backend", "c10d", "--rdzv-id", name]
        meet += ["--rdzv-endpoint", f'"{head}:{_PORT}"']
    restarts = ["--max-restarts", str(machines.restarts)] if machines.restarts else []
    # a store for each start: in one for all, processes read the addresses of those that died
    fresh = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if machines.nodes > 1 and machines.restarts else []
    started = [*fresh, "torchrun", *meet, "--nproc-per-node", str(machines.gpus), *restarts, "-m", "mbx"]
    return " ".join([*started, shlex.join(words)])


def slurm_script(recipe: Recipe, words: Sequence[str], machines: Machines) -> str:
    """An `sbatch` script: a torchrun a node, SIGTERM ahead of the end of the job's time, requeued when preempted."""
    line = torchrun_line(words, machines, head="$head", name="$SLURM_JOB_ID")
    return f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(recipe.name)}
#SBATCH --nodes={machines.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={machines.gpus}
#SBATCH --signal=TERM@{_GRACE_S}
#SBATCH --requeue
#SBATCH --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 env {line}
"""
