"""What is found of two sides' files: differences, and what one side alone has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mbx.proof.gaps import Gap

Said: TypeAlias = Mapping[str, object]


@dataclass(slots=True)
class Beside:
    """What was found of two sides' files: differences, and what one side alone has."""

    findings: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def hold(self, what: str, mine: object, other: object, nouns: tuple[str, str]) -> None:
        """Note a difference of `what`; where one side has none (None), that it was not compared."""
        if mine is None and other is None:
            return
        if mine is None or other is None:
            self.gaps.append(Gap("not compared", f"{what}, which {nouns[mine is None]} alone has"))
        elif mine != other:
            self.findings.append(f"{what} differs: {shown(mine)} in {nouns[0]}, {shown(other)} in {nouns[1]}")

    def hold_keys(self, what: str, mine: Said, other: Said, nouns: tuple[str, str]) -> None:
        """Note every key by which two objects say different things; what is absent says None."""
        for key in sorted(set(mine) | set(other)):
            if mine.get(key) != other.get(key):
                self.findings.append(
                    f"{what} `{key}`: {shown(mine.get(key))} in {nouns[0]}, {shown(other.get(key))} in {nouns[1]}"
                )


def shown(value: object) -> str:
    """A value in a line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
