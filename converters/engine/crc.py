"""CRC-32 of a whole from the CRC-32 of its parts."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
Matrix = tuple[int, ...]


def _times(matrix: Matrix, vector: int) -> int:
    total, row = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[row]
        vector >>= 1
        row += 1
    return total


def _square(matrix: Matrix) -> Matrix:
    return tuple(_times(matrix, row) for row in matrix)


@lru_cache(maxsize=64)
def _zero_bytes(power: int) -> Matrix:
    """Operator that appends 2**power zero bytes to a message."""
    if power == 0:
        matrix: Matrix = (_POLYNOMIAL, *(1 << n for n in range(31)))
        for _ in range(3):
            matrix = _square(matrix)
        return matrix
    return _square(_zero_bytes(power - 1))


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of A followed by B, given those of A and B and the length of B.

    Law: `combine(crc32(a), crc32(b), len(b)) == crc32(a + b)`. The method is zlib's: appending zero bytes is a
    linear map over GF(2), applied by repeated squaring.
    """
    power = 0
    while second_bytes:
        if second_bytes & 1:
            first = _times(_zero_bytes(power), first)
        second_bytes >>= 1
        power += 1
    return first ^ second
