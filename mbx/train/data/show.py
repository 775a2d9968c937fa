"""Examples as text again, with what is learned marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from mbx.train.data.chosen import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Shown:
    """An example: its place, its numbers of tokens and of learned ones, and its text in runs, each learned or not."""

    place: str
    tokens: int
    learned: int
    runs: Sequence[tuple[str, bool]]

    def document(self) -> dict[str, object]:
        """Plain values."""
        runs = [{"text": text, "learned": learned} for text, learned in self.runs]
        return {"place": self.place, "tokens": self.tokens, "learned_tokens": self.learned, "runs": runs}

    def lines(self, marked: Callable[[str], str]) -> Iterator[str]:
        """Its text, line by line and set in; `marked` marks a piece that is learned."""
        yield f"{self.place}: {self.tokens} tokens, {self.learned} learned"
        line = ""
        for text, learned in self.runs:
            pieces = text.split("\n")
            for number, piece in enumerate(pieces):
                last = number == len(pieces) - 1
                piece = piece if last else f"{piece}\\n"
                line += (marked(piece) if learned else piece) if piece else ""
                if not last:
                    yield f"  {line}"
                    line = ""
        if line:
            yield f"  {line}"


def shown(parts: Sequence[Chosen], count: int, tokenizer: PreTrainedTokenizerBase) -> list[Shown]:
    """The first `count` examples, of each part in turn; a token that ends within a character is shown as U+FFFD."""
    out = []
    turns = ((at, chosen) for at in range(max(map(len, parts))) for chosen in parts if at < len(chosen))
    for at, chosen in islice(turns, count):
        example = chosen[at]
        cuts = [0, *(np.flatnonzero(np.diff(example.learn)) + 1).tolist(), len(example.tokens)]
        runs = [
            (_decoded(tokenizer, example.tokens[first:last].tolist()), bool(example.learn[first]))
            for first, last in zip(cuts, cuts[1:], strict=False)
            if last > first
        ]
        place = chosen.corpus.place(int(chosen.numbers[at]))
        out.append(Shown(place, len(example.tokens), int(example.learn[1:].sum()), runs))
    return out


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
