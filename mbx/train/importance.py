"""The importance of a model's parts, measured on a file of training data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.errors import UsageError
from converters.pruning.choosing import Importance
from mbx.formats.architecture import table_of
from mbx.formats.registry import open_checkpoint
from mbx.models.tokenizer import read_tokenizer
from mbx.run.importance_file import importance_text
from mbx.train.data.examples import Reading, resolved, write_examples
from mbx.train.data.sources import open_sources
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    import torch

    from mbx.train.data.tokens import Example


def importance_of(
    source: Path,
    data: str,
    target: Path | None = None,
    *,
    samples: int = 64,
    length: int = 512,
    device: str = "cpu",
    dtype: str = "float32",
    mapping: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Importance:
    """Measure the Hugging Face model in `source` on `samples` rows of `length` tokens of `data`, and write `target`.

    `data` is whatever a recipe's `data.path` takes: documents, chats, completions; examples follow each other in rows,
    as in pretraining. Fewer rows are measured where there is less data. Raises UsageError for a source of another
    kind, or data of less than a row.
    """
    opened = open_checkpoint(source)
    if opened.spelling != "hf":
        raise UsageError(
            f"`{source}` is no Hugging Face folder: importance is measured in Transformers",
            hint=f"mbx convert mcore-to-hf {source} DIR",
        )
    table = table_of(opened, opened.config, mapping)
    fields = table.config.to_mcore(opened.config)
    ids = token_rows(source, data, samples, length)
    from mbx.models.transformers.importance import measure_importance

    found = measure_importance(source, table, fields, ids, device=device, dtype=dtype, progress=progress)
    if target is not None:
        measured = {"source": source.name, "data": Path(data).name, "rows": len(ids), "tokens": ids.numel()}
        target.write_bytes(importance_text(found, measured))
    return found


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
