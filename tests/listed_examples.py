"""Examples of a file in memory, for tests: what `mbx.train.data` prepares, without its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbx.train.data.examples import Reading, Source, nothing_to_learn, refuse_long, resolved, write_examples
from mbx.train.data.sources import open_sources
from mbx.train.data.tokens import Example
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_examples(data: Data, path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Examples of a file in memory, as long as `data` allows; a bad record is a UsageError that names its place."""
    sources = open_sources(str(path))
    data = resolved(replace(data, path=str(path)))
    sink = _Listed(data, sources)
    write_examples(sources, Reading.of(data, sources, tokenizer), sink, workers=1)
    return sink.done(path)


class _Listed:
    def __init__(self, data: Data, sources: Sequence[Source]) -> None:
        self.data, self.sources = data, sources
        self.examples: list[Example] = []
        self.long: list[str] = []

    def add(self, source: int, place: str, example: Example, rewritten: bool) -> None:
        """Keep, cut or note an example."""
        if len(example.tokens) > self.data.length + 1 and self.data.kind != "text":
            self.long.append(f"{self.sources[source].name}{place}: {len(example.tokens)} tokens")
            if self.data.too_long != "truncate":
                return
            example = Example(example.tokens[: self.data.length + 1], example.learn[: self.data.length + 1])
        self.examples.append(example)

    def done(self, path: Path) -> list[Example]:
        """What was kept; UsageError where that is not all, or nothing to learn from."""
        refuse_long(self.data, self.long, len(self.long))
        if not any(example.learn[1:].any() for example in self.examples):
            raise nothing_to_learn(str(path))
        return self.examples
