"""Causes that change values one by one: a flipped bit, norm offsets, roundings, signs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from converters.casts import convert
from converters.causes.rows import FLOATS, WORDS, Bytes, Rows, Suspect, blocks, flat, words
from converters.tensors import DTYPE_BITS

Change = Callable[[Bytes], Bytes]
_NARROWER: dict[str, tuple[str, ...]] = {"F64": ("F32", "BF16", "F16"), "F32": ("BF16", "F16"), "BF16": ("F16",)}


def one_bit(expected: Rows, actual: Rows, suspect: Suspect) -> str | None:
    where: tuple[int, int] | None = None
    flipped = 0
    for block in blocks(actual):
        changed = np.bitwise_xor(
            words(expected, block).astype(np.uint64, copy=False), words(actual, block).astype(np.uint64, copy=False)
        )
        rows, cols = np.nonzero(changed)
        if len(rows) + (where is not None) > 1:
            return None
        if len(rows):
            where, flipped = (int(block[rows[0]]), int(cols[0])), int(changed[rows[0], cols[0]])
    if where is None or flipped & (flipped - 1):
        return None
    at = list(where) if expected.cols > 1 else [where[0]]
    return f"bit {flipped.bit_length() - 1} of the value at {at} is flipped"


def changed_values(expected: Rows, actual: Rows) -> str | None:
    """Norm offsets and roundings: functions of single values, of which either side may have lost bits."""
    dtype = expected.dtype
    if dtype not in FLOATS:
        return None
    plus, minus = _shifted(dtype, 1), _shifted(dtype, -1)
    offset = "it is the expected {} 1: the other convention of norm weights"
    tries: list[tuple[str, Rows, Change, Rows]] = [
        (offset.format("plus"), expected, plus, actual),
        (offset.format("plus"), actual, minus, expected),
        (offset.format("minus"), expected, minus, actual),
        (offset.format("minus"), actual, plus, expected),
    ]
    for through in _NARROWER.get(dtype, ()):
        change = _rounded(dtype, through)
        tries.append((f"it was rounded through {through}", expected, change, actual))
        tries.append((f"the other side was rounded through {through}", actual, change, expected))
    tries.append(("every sign is turned", expected, _negated(dtype), actual))
    for sentence, given, change, made in tries:
        if all(np.array_equal(change(flat(given, block)), flat(made, block)) for block in blocks(actual)):
            return sentence
    return None


def _shifted(dtype: str, shift: int) -> Change:
    return lambda data: convert(data, dtype, dtype, shift)


def _rounded(dtype: str, through: str) -> Change:
    return lambda data: convert(convert(data, dtype, through, 0), through, dtype, 0)


def _negated(dtype: str) -> Change:
    word = WORDS[DTYPE_BITS[dtype] // 8]
    sign = word(1 << (DTYPE_BITS[dtype] - 1))

    def change(data: Bytes) -> Bytes:
        return np.asarray(data.view(word) ^ sign).view(np.uint8)

    return change
