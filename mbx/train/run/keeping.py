"""What a run keeps besides its last checkpoints: that of the best validation loss, and exports along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mbx.train.checkpoints.best import Best, read_best, write_best
from mbx.train.checkpoints.export import export_beside
from mbx.train.checkpoints.store import Store
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe
from mbx.train.run.log import Log

if TYPE_CHECKING:
    from torch import nn


class Keeper:
    """Judges evaluations and exports checkpoints of one run; all calls are collective.

    `until`: the step that a run is resumed at; what was best behind it is forgotten.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, store: Store, log: Log, until: int | None) -> None:
        self.recipe, self.ranks, self.store, self.log = recipe, ranks, store, log
        self.best = Best() if until is None else read_best(recipe.run_dir, until=until)

    def judge(self, step: int, loss: float, save: Callable[[], None]) -> str:
        """Log an evaluation, with its checkpoint where it is the best and that is kept; why to stop, if so."""
        self.log.evaluation(step, loss)
        self.best, run, patience = self.best.after(step, loss), self.recipe.run, self.recipe.train.patience
        if run.keep_best and run.save and self.best.step == step:
            save()
            self.store.settle(wait=True)
        if self.ranks.is_main and (run.keep_best or patience):
            write_best(self.recipe.run_dir, self.best)
        if not patience or self.best.waited < patience:
            return ""
        return f"stopped early, no better validation loss since step {self.best.step},"

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint of this step."""
        run = self.recipe.run
        return any(every and step % every == 0 for every in (run.save_every, run.export_every))

    def export(self, step: int, chunks: Sequence[nn.Module], base: str, *, last: bool = False) -> None:
        """Write the model of `step` as a folder, where the recipe asks for one now; `base` is an adapter's."""
        every = self.recipe.run.export_every
        if not every or last == (step % every == 0):  # the last of all, where that is none of those
            return
        self.store.settle(wait=True)
        plan, template = self.store.plan, self.store.template
        said = export_beside(self.recipe, plan, chunks, step, base=base, template=template)
        if self.ranks.is_main:
            self.log.message(said)
