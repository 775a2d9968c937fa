"""CRC-32 of parts combines to that of the whole."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from converters.engine.crc import combine


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine_is_concatenation(a: bytes, b: bytes) -> None:
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_combine_over_large_lengths() -> None:
    a, b = b"head", bytes(10_000_000)
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
