"""Changes of value: casts and norm offsets between float dtypes, elementwise on raw bytes, with NumPy alone.

A conversion that only casts need not wait for torch, nor hold it in memory: importing it takes longer than copying a
gigabyte. Results equal torch's bit for bit but for NaN, whose payload torch keeps or not as the processor has it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from converters.tensors import DTYPE_BITS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint16]

#: Dtypes cast here; any other goes by way of torch.
_NUMPY: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(np.uint16),  # NumPy has no bfloat16: the upper half of a float32
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_WORDS = 1 << 16
_GROUP = 8
_GROUP_OF_WORDS = np.dtype((np.void, 2 * _GROUP))
#: Values whose exceptions are looked up at once.
_MANY = 1 << 20
#: Values cast at once: what the steps of a cast hand on stays in a core's own cache.
_BLOCK = 1 << 17


def convert(data: Bytes, source: str, target: str, shift: int = 0, out: Bytes | None = None) -> Bytes:
    """`data` (contiguous, of dtype `source`) cast to `target`, `shift` added first; flat, in `out` where it can be.

    A shift is computed in fp32 and rounded once to the target dtype, to nearest, ties to even. Values beyond the
    target's range become infinite.
    """
    if source == target and not shift:
        return data.reshape(-1)
    if source not in _NUMPY or target not in _NUMPY:
        from converters.torch_casts import convert as by_torch

        return by_torch(data, source, target, shift)
    values = data.reshape(-1).view(_NUMPY[source])
    if out is None:
        out = np.empty(values.size * _NUMPY[target].itemsize, np.uint8)
    cast = out.reshape(-1).view(_NUMPY[target])
    if "F16" in (source, target) and values.itemsize == 2 and values.size > _WORDS:
        from_table = _halve if (source, target, shift) == ("BF16", "F16", 0) else _look_up
        from_table(_table(source, target, shift), values.view(np.uint16), cast)
    else:
        _cast(values, source, target, shift, cast)
    return out.reshape(-1)


def overflown(cast: Bytes, values: Bytes, source: str) -> int:
    """How many finite `values` (of dtype `source`) became infinite in `cast`, of F16: all beyond 65504."""
    words, count = cast.reshape(-1).view(np.uint16), 0
    item = DTYPE_BITS[source] // 8
    for at in range(0, words.size, _BLOCK):
        block = words[at : at + _BLOCK]
        if block.max() >= 0xFC00 or block.view(np.int16).max() >= 0x7C00:  # of either sign, or NaN
            found = block & 0x7FFF == 0x7C00
            there = values.reshape(-1)[at * item : (at + block.size) * item]
            count += int((found & np.isfinite(convert(there, source, "F64").view(np.float64))).sum())
    return count


def restore(original: Bytes, dtype: str, stored: Bytes, stored_dtype: str, changed: Bytes, shift: int) -> Bytes:
    """`changed`, with elements of `original` (both of `dtype`) wherever `original + shift` is exactly `stored`."""
    item, stored_item = DTYPE_BITS[dtype] // 8, DTYPE_BITS[stored_dtype] // 8
    image = convert(original, dtype, stored_dtype, shift).reshape(-1, stored_item)
    unchanged = (image == stored.reshape(-1, stored_item)).all(axis=1)
    flat: Bytes = changed.reshape(-1, item).copy()
    flat[unchanged] = original.reshape(-1, item)[unchanged]
    return flat.reshape(changed.shape)


@lru_cache(maxsize=8)
def _table(source: str, target: str, shift: int) -> npt.NDArray[np.generic]:
    """What each of the 65,536 values of a 16-bit dtype becomes: NumPy's own half casts are three times slower."""
    words = np.arange(_WORDS, dtype=np.uint16)
    table = np.empty(_WORDS, _NUMPY[target])
    _cast(words.view(_NUMPY[source]), source, target, shift, table)
    return table


def _look_up(table: npt.NDArray[np.generic], words: Words, cast: npt.NDArray[np.generic]) -> None:
    for at in range(0, words.size, _BLOCK):
        # Clipping changes no index, and spares NumPy a copy of the result.
        np.take(table, words[at : at + _BLOCK], out=cast[at : at + _BLOCK], mode="clip")


def _halve(table: npt.NDArray[np.generic], words: Words, cast: npt.NDArray[np.generic]) -> None:
    """bf16 to fp16 by arithmetic, in three quarters of the time; the table is for what fp16 has no normal number for.

    A number that is normal in both keeps its sign, its exponent, biased by 112 less, and its 7 bits of mantissa, which
    3 zeros follow: of sign S and magnitude M it becomes S + 8 (M - 112 * 128), which is S + M + 7 (M - 0x4000) in 16
    bits. Magnitudes from 113 * 128 on, for 30 exponents, are such numbers.
    """
    whole, half = words.size // _GROUP * _GROUP, cast.view(np.uint16)
    spare, odd = np.empty(_WORDS, np.uint16), np.empty(min(_MANY, whole), bool)
    for first in range(0, whole, _MANY):
        last = min(first + _MANY, whole)
        for at in range(first, last, _WORDS):
            block, into = (array[at : min(at + _WORDS, last)] for array in (words, half))
            sevenfold = spare[: block.size]
            np.bitwise_and(block, 0x7FFF, out=sevenfold)
            np.subtract(sevenfold, 113 << 7, out=into)  # what is too small wraps around
            np.greater_equal(into, 30 << 7, out=odd[at - first : at - first + block.size])
            sevenfold -= 0x4000
            sevenfold *= 7
            np.add(block, sevenfold, out=into)
        # Eight at a time: to find single ones takes NumPy three times as long.
        groups = np.flatnonzero(odd[: last - first].view(np.uint64) != 0)
        if groups.size > (last - first) // (4 * _GROUP):
            _look_up(table, words[first:last], cast[first:last])
        elif groups.size:
            found = words[first:last].view(_GROUP_OF_WORDS).take(groups).view(np.uint16)
            half[first:last].view(_GROUP_OF_WORDS)[groups] = table.take(found, mode="clip").view(_GROUP_OF_WORDS)
    _look_up(table, words[whole:], cast[whole:])


def _cast(
    values: npt.NDArray[np.generic], source: str, target: str, shift: int, cast: npt.NDArray[np.generic]
) -> None:
    wide, spare = np.empty(min(_BLOCK, values.size), np.float32), np.empty(min(_BLOCK, values.size), np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, values.size, _BLOCK):
            block, into = values[at : at + _BLOCK], cast[at : at + _BLOCK]
            floats = _widened(block, source, wide[: block.size], copied=bool(shift))
            if shift:
                floats += np.float32(shift)
            _narrow(floats, target, into, spare[: block.size])


def _widened(block: npt.NDArray[np.generic], dtype: str, wide: Floats, *, copied: bool) -> Floats:
    """A block as fp32: in `wide`, or as it is where it need not be `copied`."""
    if dtype == "BF16":
        words = wide.view(np.uint32)
        words[:] = block
        words <<= 16
    elif dtype == "F32" and not copied:
        return block.view(np.float32)
    else:
        np.copyto(wide, block, casting="same_kind")
    return wide


def _narrow(floats: Floats, dtype: str, into: npt.NDArray[np.generic], spare: npt.NDArray[np.uint32]) -> None:
    """Round fp32 values to `dtype`."""
    if dtype != "BF16":
        np.copyto(into, floats, casting="same_kind")
        return
    # To nearest, ties to even: add half of the last kept place, less one bit where that place is even, and cut.
    words = floats.view(np.uint32)
    np.right_shift(words, 16, out=spare)
    spare &= 1
    spare += 0x7FFF
    spare += words
    into[:] = spare.view(np.uint16)[1::2]  # the upper halves: these machines are little-endian
    nan = np.isnan(floats)
    if nan.any():  # the addition may carry a NaN over into another number: keep it, quiet, as processors do
        into[nan] = (words[nan] >> 16 | 0x40).astype(np.uint16)
