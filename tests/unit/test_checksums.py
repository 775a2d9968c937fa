"""CRC-32 is zlib's, and that of parts combines to that of the whole."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from converters.checksums import combine, crc32


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine_is_concatenation(a: bytes, b: bytes) -> None:
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_combine_over_large_lengths() -> None:
    a, b = b"head", bytes(10_000_000)
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**20), st.integers(0, 2**20))
def test_combine_is_associative(a: int, b: int, middle: int, last: int) -> None:
    """Whatever the lengths, those beyond any test's memory included: the three ways to sum 2^40 bytes agree."""
    middle, last = middle << 20, last << 20
    whole = combine(combine(0, a, middle), b, last)
    assert whole == combine(0, combine(a, b, last), middle + last)


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1), st.integers(0, 64))
def test_values_are_those_of_zlib(data: bytes, before: int, skip: int) -> None:
    """Of any bytes, after any others, from any alignment, in any kind of buffer."""
    view = memoryview(data)[skip:]
    assert crc32(view) == zlib.crc32(view)
    assert crc32(bytearray(view), before) == zlib.crc32(view, before)


def test_values_of_megabytes_are_those_of_zlib() -> None:
    data = memoryview(bytes(range(256)) * (1 << 15))
    for start, stop in ((0, len(data)), (1, len(data)), (0, -1), (63, -65)):
        assert crc32(data[start:stop]) == zlib.crc32(data[start:stop])
