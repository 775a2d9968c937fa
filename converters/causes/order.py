"""Causes that put values elsewhere: rows and columns in another order, the values of another tensor."""

from __future__ import annotations

import numpy as np

from converters.causes.row_orders import arrangements
from converters.causes.rows import BLOCK_VALUES, Index, Rows, Suspect, blocks, sample, spans, words


def rearranged(expected: Rows, actual: Rows, suspect: Suspect) -> str | None:
    some = sample(actual, suspect.first_row)
    found = words(actual, some)
    for sentence, order in arrangements(expected.rows, suspect.structure):
        if np.array_equal(found, words(expected, order[some])) and _is_ordered(expected, actual, order):
            return sentence
    return None


def _is_ordered(expected: Rows, actual: Rows, order: Index) -> bool:
    return all(np.array_equal(actual.take(block), expected.take(order[block])) for block in blocks(actual))


def transposed(expected: Rows, actual: Rows) -> bool:
    """Whether `actual` has for columns the rows of `expected`, tried in tiles of a bounded size."""
    tile = max(1, int(BLOCK_VALUES // max(expected.cols, actual.cols, 1)))
    for block in spans(expected.rows, tile):
        wanted = words(expected, block)
        for other in spans(actual.rows, tile):
            if not np.array_equal(words(actual, other)[:, block], wanted[:, other].T):
                return False
    return True


def swapped_columns(expected: Rows, actual: Rows) -> str | None:
    if expected.cols % 2 or expected.cols < 2:
        return None
    for block in blocks(actual):
        if not np.array_equal(words(actual, block), np.roll(words(expected, block), expected.cols // 2, axis=1)):
            return None
    return "the two halves of its columns are swapped"


def taken_from_a_peer(actual: Rows, suspect: Suspect) -> str | None:
    some = sample(actual, suspect.first_row)[:4]
    found = words(actual, some)
    for peer in suspect.peers:
        other = peer.rows()
        if (other.rows, other.cols, other.dtype) != (actual.rows, actual.cols, actual.dtype):
            continue
        if not np.array_equal(words(other, some[:1]), found[:1]):
            continue
        if np.array_equal(words(other, some), found) and _is_ordered(
            other, actual, np.arange(actual.rows, dtype=np.int64)
        ):
            return f"it holds {peer.what}"
    return None
