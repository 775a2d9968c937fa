"""Why a tensor is not what it should be: a closed list of defects, each tried on the stored bits.

Every hypothesis predicts all of the actual values from the expected ones, or the other way round (or says what they
all are), so a sentence is given only where it explains the whole tensor. Rows are asked for in blocks: memory stays at
a few of them.
"""

from __future__ import annotations

from converters.causes.content import content, lost_rows, resized
from converters.causes.order import rearranged, swapped_columns, taken_from_a_peer, transposed
from converters.causes.rows import Peer, Rows, Suspect, floats
from converters.causes.values import changed_values, one_bit

__all__ = ["Peer", "Rows", "Suspect", "find_cause", "floats"]


def find_cause(expected: Rows, actual: Rows, suspect: Suspect) -> str | None:
    """The likely cause in a few words, None where no hypothesis explains every value.

    Both have the same columns and dtype; `actual` may have fewer rows (a tensor cut short), or be the transposed of
    `expected`, where only that is tried.
    """
    if (actual.rows, actual.cols) == (expected.cols, expected.rows) and actual.rows != expected.rows:
        return "it is transposed" if transposed(expected, actual) else None
    if actual.cols != expected.cols:
        return None
    if actual.rows != expected.rows:
        return resized(expected, actual)
    return (
        content(expected, actual)
        or one_bit(expected, actual, suspect)
        or changed_values(expected, actual)
        or rearranged(expected, actual, suspect)
        or ("it is transposed" if expected.rows == expected.cols and transposed(expected, actual) else None)
        or swapped_columns(expected, actual)
        or taken_from_a_peer(actual, suspect)
        or lost_rows(expected, actual)
    )
