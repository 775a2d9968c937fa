"""What a comparison could not look at: named in its report, and no proof of it unless somebody asked for less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

#: `not compared`: one side alone has it. `not reached`: no prompt comes to it. `not told apart`: the weights given
#: are the same whichever row of the table they belong to.
Kind = Literal["not compared", "not reached", "not told apart"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Something of the two models that no leg looked at."""

    kind: Kind
    what: str

    @property
    def line(self) -> str:
        """The gap in one line, which globs are held against."""
        return f"{self.kind}: {self.what}"


def open_gaps(gaps: Iterable[Gap], allowed: Sequence[str]) -> tuple[Gap, ...]:
    """Those whose line no glob of `allowed` matches, each once."""
    return tuple(gap for gap in dict.fromkeys(gaps) if not any(fnmatchcase(gap.line, glob) for glob in allowed))
