"""Causes that lie in what the values are, whatever was expected: NaN, constants, what was never written, cut ends."""

from __future__ import annotations

import numpy as np

from converters.causes.rows import BLOCK_VALUES, FLOATS, Rows, blocks, floats, spans, words


def content(expected: Rows, actual: Rows) -> str | None:
    """NaN, all zero, all the same."""
    total = actual.rows * actual.cols
    if actual.dtype in FLOATS and (strange := _not_finite(actual)) and strange > _not_finite(expected):
        return (
            "every value is NaN or infinite"
            if strange == total
            else f"{strange} of {total} values are NaN or infinite"
        )
    if total < 2 or not _is_constant(actual) or _is_constant(expected):
        return None
    value = floats(actual.take(np.zeros(1, np.int64)), actual.dtype)[0]
    if value == 0:
        return "every value is zero: it was never written"
    return f"every value is {value:g}: a constant, as an initialiser leaves it"


def _not_finite(rows: Rows) -> int:
    return sum(int((~np.isfinite(floats(rows.take(block), rows.dtype))).sum()) for block in blocks(rows))


def _is_constant(rows: Rows) -> bool:
    first: object = None
    for block in blocks(rows):
        found = words(rows, block)
        first = found.flat[0] if first is None else first
        if not (found == first).all():
            return False
    return True


def lost_rows(expected: Rows, actual: Rows) -> str | None:
    """Rows that are zero where they should not be, and everything else as expected."""
    zero: list[int] = []
    for block in blocks(actual):
        wanted, found = words(expected, block), words(actual, block)
        wrong = (wanted != found).any(axis=1)
        if (found[wrong] != 0).any():
            return _lost_columns(expected, actual)
        zero += block[wrong].tolist()
    if not zero:
        return None
    first, last = zero[0], zero[-1]
    if last == actual.rows - 1 and len(zero) == last - first + 1:
        return f"the rows from {first} on are zero: it was cut short, or a shard was not written"
    if len(zero) == last - first + 1:
        return f"the rows {first} to {last} are zero: a shard was not written"
    return f"{len(zero)} of {actual.rows} rows are zero"


def _lost_columns(expected: Rows, actual: Rows) -> str | None:
    wrong = np.zeros(actual.cols, bool)
    for block in blocks(actual):
        wanted, found = words(expected, block), words(actual, block)
        if ((wanted != found) & (found != 0)).any():
            return None
        wrong |= (wanted != found).any(axis=0)
    first, last = int(wrong.argmax()), actual.cols - 1 - int(wrong[::-1].argmax())
    return f"the columns {first} to {last} are zero: a shard was not written"


def resized(expected: Rows, actual: Rows) -> str | None:
    shared = min(expected.rows, actual.rows)
    for block in spans(shared, max(1, BLOCK_VALUES // max(1, actual.cols))):
        if not np.array_equal(words(expected, block), words(actual, block)):
            return None
    if actual.rows < expected.rows:
        return f"it was cut to its first {shared} of {expected.rows} rows, which agree"
    return f"{actual.rows - shared} rows follow the {shared} that agree"
