"""The best validation loss of a run: which checkpoint had it, and how many evaluations ago.

RUN/best.json     {"step", "loss", "waited"}; `Store` keeps the checkpoint of `step`
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from converters.errors import StorageError
from mbx.train.checkpoints.whole import write_whole
from mbx.untrusted.small_files import read_json

BEST = "best.json"


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: its step, its loss, and evaluations since."""

    step: int = -1
    loss: float = math.inf
    waited: int = 0

    def after(self, step: int, loss: float) -> Best:
        """The best once an evaluation has been made."""
        return Best(step, loss) if loss < self.loss else replace(self, waited=self.waited + 1)


def read_best(run: Path, *, until: int | None = None) -> Best:
    """What a run says was best; nothing yet where it says nothing, or where that lies behind step `until`."""
    if not (run / BEST).is_file():
        return Best()
    try:
        raw = read_json(run / BEST)
        found = Best(int(raw["step"]), float(raw["loss"]), int(raw["waited"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"`{run / BEST}` says nothing of a best step: {error}") from error
    return Best() if until is not None and found.step > until else found


def write_best(run: Path, best: Best) -> None:
    """Say what was best, whole or not at all."""
    write_whole(run, BEST, json.dumps(asdict(best)))
