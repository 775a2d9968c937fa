"""Tokens that show more than drawn ones: special ones, and those whose embeddings are the smallest and the largest.

A row near zero, as of a reserved token that was hardly trained, makes the epsilon of the first norm decide.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping

import numpy as np

from converters.causes import floats
from converters.engine.plan import FLOATS
from converters.protocols import Source
from converters.rows.expr import Value
from converters.stored import read_box
from converters.tensors import StoredTensor

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: How many of the smallest and of the largest rows.
_EXTREMES = 3
_BLOCK_BYTES = 1 << 20


def telling_tokens(
    embedding: StoredTensor | None, source: Source, vocab: int, config: Mapping[str, Value]
) -> list[int]:
    """Token ids below `vocab`, each once: the special ones of `config`, then those of extreme rows of `embedding`.

    Rows of zeros are left out: behind them routers have ties, which either side may break its own way.
    """
    ids: list[int] = []
    for key in _IDS:
        value = config.get(key)
        ids += [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
    if embedding is not None and embedding.dtype in FLOATS and len(embedding.shape) == 2:
        norms = [(norm, row) for row, norm in enumerate(_norms(embedding, source, vocab)) if 0 < norm < math.inf]
        ids += [row for _, row in (*heapq.nsmallest(_EXTREMES, norms), *heapq.nlargest(_EXTREMES, norms))]
    return [token for token in dict.fromkeys(ids) if 0 <= token < vocab]


def _norms(embedding: StoredTensor, source: Source, vocab: int) -> Iterator[float]:
    """The norm of each row, read some rows at a time."""
    rows, width = min(vocab, embedding.shape[0]), embedding.shape[1]
    step = max(1, _BLOCK_BYTES // max(1, width))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        block = read_box(embedding, source, (first, 0), (count, width))
        values = floats(block.reshape(-1), embedding.dtype).reshape(count, width)
        with np.errstate(over="ignore", invalid="ignore"):
            yield from np.sqrt(np.einsum("ij,ij->i", values, values)).tolist()
