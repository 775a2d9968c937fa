"""Which of the prepared examples are trained on and which validate: long ones left out or cut, a share held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from converters.errors import UsageError
from mbx.train.data.corpus import Corpus
from mbx.train.data.examples import nothing_to_learn, refuse_long
from mbx.train.data.tokens import Example, ExampleSequence
from mbx.train.recipe.sections import Data

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)  # no slots: `learned` looks at every token, once
class Chosen(ExampleSequence):
    """Examples `numbers` of a corpus, each cut to `limit` tokens; `dropped` and `cut` count what was too long."""

    corpus: Corpus
    numbers: Numbers
    limit: int
    dropped: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, number: int) -> Example:
        """The `number`-th of those that are chosen."""
        found = self.corpus.at(int(self.numbers[number]))
        return replace(found, tokens=found.tokens[: self.limit], learn=found.learn[: self.limit])

    @property
    def sizes(self) -> Numbers:
        """Tokens of each example."""
        return np.minimum(self.corpus.sizes[self.numbers], self.limit)

    @cached_property
    def learned(self) -> int:
        """Learned tokens of all."""
        counts = self.corpus.learned()[self.numbers]
        for at in np.flatnonzero(self.corpus.sizes[self.numbers] > self.limit):
            counts[at] = self.at(int(at)).learn[1:].sum()
        return int(counts.sum())


@dataclass(frozen=True)  # no slots: where each part begins is counted once
class Joined(ExampleSequence):
    """Examples of several files, one file behind the other."""

    parts: Sequence[Chosen]

    @cached_property
    def _starts(self) -> Numbers:
        return np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def at(self, number: int) -> Example:
        """The `number`-th of all."""
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.parts[part].at(number - int(self._starts[part]))

    @property
    def sizes(self) -> Numbers:
        """Tokens of each example."""
        return np.concatenate([part.sizes for part in self.parts])


def choose(data: Data, corpus: Corpus, named: str, *, share: float = 0.0) -> tuple[Chosen, Chosen | None]:
    """The examples to train on and, of a `share` above 0, those that are held out, drawn by `data.seed`.

    `named`: where they are from. UsageError where examples are longer than a row and that is an error, and where
    nothing is left to learn.
    """
    limit = data.length + 1 if data.kind != "text" else 1 << 62
    sizes = corpus.sizes
    long = np.flatnonzero(sizes > limit)
    if len(long) and data.too_long == "error":
        refuse_long(data, [f"{corpus.place(int(at))}: {sizes[at]} tokens" for at in long[:100]], len(long))
    if data.too_long == "truncate" and len(torn := long[corpus.pictured[long]]):
        raise UsageError(
            f"{corpus.place(int(torn[0]))}: a conversation with images is longer than data.length {data.length}, and "
            "an image is not cut",
            hint="raise data.length, or data.too_long=drop",
        )
    drops = data.too_long == "drop" and len(long) > 0
    numbers = np.flatnonzero(sizes <= limit) if drops else np.arange(len(sizes))
    numbers = numbers[sizes[numbers] > 1]  # of one token nothing is predicted
    held = None
    if share:
        order = np.random.default_rng(data.seed).permutation(len(numbers))
        count = max(1, round(share * len(numbers)))
        if count >= len(numbers):
            raise UsageError(
                f"data.eval_share={share:g} of {len(numbers)} example(s) leaves none to train on",
                hint="data.eval_path names other validation rows",
            )
        held = Chosen(corpus, numbers[np.sort(order[:count])], limit)
        numbers = numbers[np.sort(order[count:])]
    chosen = Chosen(corpus, numbers, limit, len(long) if drops else 0, 0 if drops else len(long))
    if not chosen.learned:
        raise nothing_to_learn(named)
    return chosen, held
