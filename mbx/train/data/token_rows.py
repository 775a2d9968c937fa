"""The first tokens of a file of training data, in rows of one length: what measures of a model are taken on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.errors import UsageError
from mbx.models.tokenizer import read_tokenizer
from mbx.train.data.examples import Reading, resolved, write_examples
from mbx.train.data.sources import open_sources
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    import torch

    from mbx.train.data.tokens import Example


class _Enough(Exception):
    """As many tokens are there as were asked for."""


class _Tokens:
    """Takes the tokens of examples, until there are `count`."""

    def __init__(self, count: int) -> None:
        self.count, self.parts, self.found = count, list[np.ndarray](), 0

    def add(self, source: int, place: str, example: Example, rewritten: bool) -> None:
        """Keep an example's tokens."""
        self.parts.append(example.tokens)
        self.found += len(example.tokens)
        if self.found >= self.count:
            raise _Enough


def token_rows(folder: Path, data: str, samples: int, length: int) -> torch.Tensor:
    """The first `samples` rows of `length` tokens of a data file under a folder's tokenizer, fewer where it has less.

    [rows, length]; UsageError for less than one row.
    """
    import torch

    if samples < 1 or length < 2:
        raise UsageError(f"‹samples› {samples} of ‹length› {length}: at least one row of two tokens is measured")
    sources = open_sources(data)
    reading = Reading.of(resolved(Data(path=data)), sources, read_tokenizer(folder))
    tokens = _Tokens(samples * length)
    with suppress(_Enough):
        write_examples(sources, reading, tokens, workers=1)
    rows = min(samples, tokens.found // length)
    if not rows:
        raise UsageError(f"`{data}` holds {tokens.found} tokens, less than a row of ‹length› {length}")
    return torch.from_numpy(np.concatenate(tokens.parts)[: rows * length].reshape(rows, length).astype(np.int64))
