"""What a run keeps: its last checkpoints, that of the best validation loss, and exports along the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from converters.errors import DeviceError, StorageError
from mbx.live.exchange import agreed
from mbx.train.checkpoints.best import Best, read_best, write_best
from mbx.train.checkpoints.export import export_beside
from mbx.train.checkpoints.state import LoopState
from mbx.train.checkpoints.store import Store
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe
from mbx.train.run.log import Log

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer


class Keeper:
    """Saves, judges evaluations and exports checkpoints of one run; all calls are collective.

    What cannot be written on the way is told, and the run goes on to the next time: hours of training are worth more.
    The last of all ends in an error. `until`: the step that a run is resumed at; what was best behind it is forgotten.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, store: Store, log: Log, until: int | None) -> None:
        self.recipe, self.ranks, self.store, self.log = recipe, ranks, store, log
        self.best = Best() if until is None else read_best(recipe.run_dir, until=until)
        self.store.best, self.store.step = self.best.step, -1 if until is None else until
        self.lost: list[str] = []
        self._best_is_behind = False

    def save(
        self,
        state: LoopState,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        *,
        last: bool = False,
    ) -> None:
        """Write a checkpoint of this step unless there is one, and its export where one is due."""
        if state.step != self.store.last_asked:
            self.settle(wait=True)
            with self._told(f"iter_{state.step:07d}", last):
                self.store.save(state, chunks, optimizer)
        self.export(state.step, chunks, state.base)

    def settle(self, *, wait: bool, last: bool = False) -> None:
        """Finish a checkpoint that is written beside the run."""
        with self._told(f"iter_{self.store.last_asked:07d}", last):
            self.store.settle(wait=wait)

    @contextlib.contextmanager
    def _told(self, what: str, last: bool) -> Iterator[None]:
        try:
            yield
        except (StorageError, DeviceError) as error:
            if last:
                raise
            self.lost.append(what)
            self.log.note(kind="unwritten", what=what, why=error.fact)
            self.log.message(f"{error.fact}; the run goes on" + (f" ({error.hint})" if error.hint else ""))

    def judge(self, step: int, loss: float, save: Callable[[], None]) -> str:
        """Log an evaluation, with its checkpoint where it is the best and that is kept; why to stop, if so."""
        self.log.evaluation(step, loss)
        before, run, patience = self.best, self.recipe.run, self.recipe.train.patience
        self.best = before.after(step, loss)
        if run.keep_best and run.save and self.best.step == step:
            save()
            self.settle(wait=True)
            if self.store.step != step:  # there is nothing to keep
                self.best = replace(before, waited=0)
        self.store.best = self.best.step
        if self.ranks.is_main and (run.keep_best or patience):
            try:
                write_best(run_dir := self.recipe.run_dir, self.best)
                self._best_is_behind = False
            except OSError as error:  # the next evaluation writes it again
                self._best_is_behind = True
                self.log.message(f"`{run_dir}`: the best step could not be written: {error.strerror}; the run goes on")
        if not patience or self.best.waited < patience:
            return ""
        return f"stopped early, no better validation loss since step {self.best.step},"

    def back(self, step: int) -> None:
        """Forget what was best behind `step`, to whose checkpoint the run went back."""
        if self.best.step > step:
            self.best = Best()
            self.store.best = -1

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint of this step."""
        run = self.recipe.run
        return any(every and step % every == 0 for every in (run.save_every, run.export_every))

    def export(self, step: int, chunks: Sequence[DistributedDataParallel], base: str, *, last: bool = False) -> None:
        """Write the model of `step` as a folder, where the recipe asks for one now and its checkpoint is whole;
        `base` is an adapter's."""
        every = self.recipe.run.export_every
        if not every or last == (step % every == 0):  # the last of all, where that is none of those
            return
        self.settle(wait=True, last=last)
        if self.store.step != step:
            return
        plan, template = self.store.plan, self.store.template
        with self._told(f"export/step_{step:07d}", last):
            said = export_beside(self.recipe, plan, chunks, step, base=base, template=template)
            if self.ranks.is_main:
                self.log.message(said)

    def finish(self) -> None:
        """Finish all that is written; StorageError or DeviceError where the last of something was not."""
        self.settle(wait=True, last=True)
        with agreed():
            if self.ranks.is_main and self._best_is_behind:
                write_best(self.recipe.run_dir, self.best)
            self.log.finish()
