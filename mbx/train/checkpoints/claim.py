"""Whose a run's folder is: that of the start that wrote into it last, as long as its storage is there.

RUN/.mbx_start     a word, drawn anew by each start

Before a checkpoint every rank reads it. Below a mount that is gone, or where a folder was moved away, there is none;
on a node that does not share the storage there never is; and a process that was thought dead finds another's.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from converters.errors import StorageError, UsageError
from mbx.live.exchange import agreed
from mbx.models.megatron.processes import on_every_rank
from mbx.train.checkpoints.whole import write_whole

START = ".mbx_start"
#: How long a network file system may take to show a node what another has written.
_PATIENCE_S = 10.0


class Claim:
    """A start's claim to the folder of its run. Made by all ranks together.

    UsageError where a rank does not see it, because the folder is not on a storage that all nodes share.
    """

    def __init__(self, run: Path, *, main: bool) -> None:
        self.run = run
        self.word = on_every_rank(secrets.token_hex(8))
        with agreed():
            if main:
                run.mkdir(parents=True, exist_ok=True)
                write_whole(run, START, self.word)
        until = time.monotonic() + _PATIENCE_S
        while (seen := self._seen()) != self.word and time.monotonic() < until:
            time.sleep(0.1)
        with agreed():
            if seen != self.word:
                raise UsageError(
                    f"`{run.absolute()}` is not the folder that rank 0 has: no checkpoint would be whole",
                    hint="run.dir=DIR names a folder on a storage that all nodes share; run.save=false saves nothing",
                )

    def check(self) -> None:
        """StorageError where the folder is not there any more, UsageError where another start has taken it over."""
        if (seen := self._seen()) == self.word:
            return
        if seen:
            raise UsageError(
                f"`{self.run}` was taken over by another start of the run: this one saves nothing more into it",
                hint="run.dir=NAME gives each run a folder of its own",
            )
        raise StorageError(
            f"`{self.run}` is not there: it was moved, or the storage that it lies on is gone",
            hint="move it back, or mount it again",
        )

    @property
    def holds(self) -> bool:
        """Whether the folder is there and this start's."""
        return self._seen() == self.word

    def _seen(self) -> str:
        try:
            return (self.run / START).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""
