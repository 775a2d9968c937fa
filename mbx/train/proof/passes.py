"""Steps of the trainer itself over rows in hand: what it found and changed, and gradients exported as weights are.

All calls are collective, inside one session.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.state import LoopState
from mbx.train.checkpoints.store import Store
from mbx.train.data.rows import Row
from mbx.train.model.parallel import seed_everything
from mbx.train.proof.rows import Fixed
from mbx.train.recipe.sections import Recipe
from mbx.train.run.dataset import Dataset
from mbx.train.run.log import Log, Step
from mbx.train.run.loop import Trainer
from mbx.train.run.prepare import Prepared

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel


@dataclass(slots=True)
class Pass:
    """One step. `gradients`, `before` and `after`: this rank's, by parameter; the latter two with buffers.

    `exported`: folders that the gradients, zeros in their place, the weights before and the stepped ones were exported
    to, on the main rank, where that was asked for. `trained`: names of what the optimizer may change.
    """

    figures: Step
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    exported: dict[str, Path] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    padded: int = 0


#: What can be exported of a step: what the weights were, their gradients, zeros in their place, what they became.
EXPORTS = ("weights", "gradients", "zeros", "stepped")


def step(
    prepared: Prepared,
    recipe: Recipe,
    rows: Sequence[Row],
    work: Path | None = None,
    exports: Collection[str] = EXPORTS,
) -> Pass:
    """One optimizer step of `recipe` over `rows`, which are its global batch; `exports` of it go under `work`."""
    sized = replace(
        recipe, train=replace(recipe.train, global_batch=len(rows)), data=replace(recipe.data, length=_length(rows))
    )
    seed_everything(recipe.train.seed)
    run = replace(prepared, recipe=sized, data=Dataset(Fixed(rows), eyes=prepared.data.eyes))
    found = Pass(Step(0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0), padded=prepared.plan.padded_vocab)

    def export(name: str) -> None:
        if work is not None and name in exports:
            _export(found, run, sized, trainer, work, name)

    def keep(chunks: Sequence[DistributedDataParallel]) -> None:
        named = dict(_parameters(chunks))
        found.gradients = {n: p.main_grad.detach().clone().float() for n, p in named.items() if p.requires_grad}  # type: ignore[attr-defined]
        found.trained = frozenset(found.gradients)
        if work is None:
            return
        with torch.no_grad():
            trained = [p for p in named.values() if p.requires_grad]
            weights = [p.detach().clone() for p in trained]
            export("weights")
            for parameter in trained:
                parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
            export("gradients")
            for parameter in trained:
                parameter.zero_()
            export("zeros")
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight)

    trainer = Trainer(run, Log(sized, main=False), on_gradients=keep)
    tower = None if trainer.seeing is None or trainer.seeing.trained else trainer.seeing.tower
    found.before = state_of(trainer.chunks, tower)  # ahead of all of the step: reducing gradients moves an expert bias
    found.figures = trainer.one_step()
    found.after = state_of(trainer.chunks, tower)
    export("stepped")
    trainer.close()
    return found


def _length(rows: Sequence[Row]) -> int:
    return len(rows[0].tokens)


def state_of(chunks: Sequence[torch.nn.Module], tower: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Copies of every parameter and every buffer, persistent or not, that a forward pass reads."""
    found = {}
    parts: list[tuple[int | str, torch.nn.Module]] = [*enumerate(chunks)]
    for number, part in [*parts, *([("tower", tower)] if tower is not None else [])]:
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if not name.endswith(_SCRATCH):
                found[f"{number}.{name}"] = tensor.detach().clone()
    return found


#: Buffers in which a step counts, and forgets.
_SCRATCH = ("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps")


def _parameters(chunks: Sequence[DistributedDataParallel]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{n}.{name}", p) for n, chunk in enumerate(chunks) for name, p in chunk.named_parameters()]


def _export(found: Pass, prepared: Prepared, recipe: Recipe, trainer: Trainer, work: Path, name: str) -> None:
    """Save what the parameters hold as a run's checkpoint, and export it as one."""
    folder = work / name
    run = replace(recipe.run, dir=str(folder), save=True, save_optimizer=False, save_async=False)
    saved = replace(recipe, run=run)
    state = LoopState(1, 0.0, trainer.base, prepared.ranks.world_size, "", prepared.plan.padded_vocab)
    if prepared.ranks.is_main:
        folder.mkdir(parents=True)
    Store(saved, prepared.plan, prepared.ranks).save(state, trainer.chunks, trainer.optimizer)
    if prepared.ranks.is_main:
        found.exported[name] = export_run(folder, work / f"{name}-hf")[0]


def off(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of two ranks' gradients over all ranks, by parameter, and of which; collective.

    |a − b| over |a|, with a 10⁻⁴ of the whole gradient's norm added below, by which tiny ones are measured.
    """
    # as a number, since a stage may train nothing: the first, where the output layer alone is adapted
    squares = [sum(float(t.double().square().sum()) for t in first.values())] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(squares, squares[0])
    whole = math.sqrt(sum(squares))
    worst = (0.0, "")
    for name, one in first.items():
        other = second[name]
        gap = float((one.double() - other.double()).norm() / (one.double().norm() + 1e-4 * whole + 1e-30))
        worst = max(worst, (gap if gap == gap else float("inf"), name))
    found: list[tuple[float, str]] = [worst] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, worst)
    return max(found)
