"""Going back where the loss leaves what it was: to the last checkpoint, and past the batches that led there."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from pathlib import Path
from statistics import median

from converters.errors import DifferenceError, UsageError
from mbx.train.checkpoints.state import RECENT, LoopState
from mbx.train.recipe.sections import Recipe
from mbx.train.run.log import Log

#: Losses behind which one is judged: those of the first steps fall too fast for a median to say anything.
_FIRST = 8


class Rewind:
    """What a run remembers in order to go back. All ranks see the same losses, so they all judge alike.

    `times`: how often it went back. `skipped`: batches that were passed over in all, by which the data has moved on.
    `bad`: losses of the last steps in a row that were not finite, or more than `train.rewind_factor` times the median
    of the last 32 others.
    """

    def __init__(self, recipe: Recipe, resumed: LoopState | None) -> None:
        self.train = recipe.train
        self.bad = 0
        self._take(resumed or LoopState(0, math.nan, "", 0, "", 0))

    def _take(self, state: LoopState) -> None:
        self.times, self.skipped, self.recent = state.rewinds, state.skipped, deque(state.recent, maxlen=RECENT)

    def into(self, state: LoopState) -> LoopState:
        """`state` with what is remembered here."""
        return replace(state, rewinds=self.times, skipped=self.skipped, recent=tuple(self.recent))

    def why(self, loss: float) -> str:
        """Look at a step's loss; why the run has to go back, empty where it has not."""
        if not self.train.rewind:
            return ""
        limit = self.train.rewind_factor * median(self.recent) if len(self.recent) >= _FIRST else math.inf
        if math.isfinite(loss) and loss <= limit:
            self.recent.append(loss)
            self.bad = 0
            return ""
        self.bad += 1
        if self.bad < self.train.rewind_steps:
            return ""
        running = f" for {self.bad} steps" if self.bad > 1 else ""
        if not math.isfinite(loss):
            return f"the loss is {loss}{running}"
        middle = f"{self.train.rewind_factor:g} times the median {limit / self.train.rewind_factor:.4f}"
        return f"the loss {loss:.4f} is more than train.rewind_factor {middle} of the last {len(self.recent)}{running}"

    def place(self, step: int, why: str, last: Path | None) -> Path:
        """The checkpoint to go back to, which is the `last` one; DifferenceError where there is none, or too often."""
        if last is not None and self.times < self.train.rewind:
            return last
        done = "there is no checkpoint to go back to" if last is None else f"the run went back {self.times} time(s)"
        hint = "a smaller run.save_every" if last is None else "a lower optim.lr, or another look at those batches"
        raise DifferenceError(f"step {step}: {why}, and {done}", hint=hint)

    def back(self, state: LoopState, step: int, why: str, log: Log) -> None:
        """Remember what the checkpoint of `state` does, and that the batches up to `step` are passed over."""
        times, past = self.times + 1, step - state.step
        skipped = self.skipped + past
        self._take(state)
        self.times, self.skipped, self.bad = times, skipped, 0
        log.note(kind="rewind", step=step, to=state.step, why=why)
        often = f"{times} of {self.train.rewind}"
        log.message(f"step {step}: {why}: back to step {state.step}, past {past} batches ({often})")


def check_rewind(recipe: Recipe) -> None:
    """UsageError where a run would have nothing to go back to."""
    run = recipe.run
    if recipe.train.rewind and not (run.save and run.save_every and run.save_optimizer):
        raise UsageError(
            "train.rewind goes back to a checkpoint of the run, and it saves none that has all of it",
            hint="run.save_every=100, with run.save and run.save_optimizer",
        )
