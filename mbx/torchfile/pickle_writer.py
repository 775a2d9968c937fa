"""Writes pickles opcode by opcode, so that they may name classes which are not installed here.

Protocol 2 throughout: it is the only one that torch's `weights_only` unpickler accepts without a warning.
"""

from __future__ import annotations

import struct

from converters.errors import StorageError


class PickleWriter:
    """Collects one pickle; strings and globals are written once and referred to afterwards."""

    __slots__ = ("_memo", "_parts")

    def __init__(self) -> None:
        self._parts: list[bytes] = [b"\x80\x02"]
        self._memo: dict[tuple[str, str], bytes] = {}

    def opcodes(self, code: bytes) -> None:
        """Opcodes as they are."""
        self._parts.append(code)

    def recall(self, key: tuple[str, str]) -> bool:
        """Pushes what was remembered under `key`; False when nothing was."""
        reference = self._memo.get(key)
        if reference is None:
            return False
        self._parts.append(reference)
        return True

    def remember(self, key: tuple[str, str]) -> None:
        """Remembers the value on top of the stack under `key`."""
        index = len(self._memo)
        if index < 256:
            put, get = b"q%c" % index, b"h%c" % index
        else:
            number = index.to_bytes(4, "little")
            put, get = b"r" + number, b"j" + number
        self._parts.append(put)
        self._memo[key] = get

    def string(self, text: str) -> None:
        """A str."""
        if not self.recall(("", text)):
            raw = text.encode()
            self._parts.append(b"X%b%b" % (len(raw).to_bytes(4, "little"), raw))
            self.remember(("", text))

    def reference(self, module: str, name: str) -> None:
        """A class, function or constant by its name."""
        if not self.recall((module, name)):
            self._parts.append(f"c{module}\n{name}\n".encode())
            self.remember((module, name))

    def integer(self, value: int) -> None:
        """An int of at most 255 bytes."""
        self._parts.append(_integer(value))

    def number(self, value: float) -> None:
        """A float."""
        self._parts.append(b"G" + struct.pack(">d", value))

    def integers(self, values: tuple[int, ...]) -> None:
        """A tuple of ints."""
        self._parts.append(b"(%bt" % b"".join(map(_integer, values)))

    def finish(self) -> bytes:
        """The pickle of the value on top of the stack."""
        self._parts.append(b".")
        return b"".join(self._parts)


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K%c" % value
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size = value.bit_length() // 8 + 1
    if size > 255:
        raise StorageError(f"an integer of {size} bytes cannot be written to a checkpoint; at most 255 can")
    return b"\x8a%c%b" % (size, value.to_bytes(size, "little", signed=True))
