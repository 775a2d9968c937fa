"""What the engine's worker threads share: a bound on memory, and the queue of pieces; and what each one keeps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from converters.engine.pieces import Piece

Matrix = npt.NDArray[np.uint8]


class MemoryGate:
    """Lets pieces start while their declared bytes fit; one piece alone may always run."""

    def __init__(self, max_bytes: int) -> None:
        self._free = self._max = max_bytes
        self._changed = threading.Condition()

    def acquire(self, amount: int) -> int:
        """Wait until `amount` (at most the whole gate) is free and take it; returns what was taken."""
        amount = min(amount, self._max)
        if amount:
            with self._changed:
                self._changed.wait_for(lambda: self._free >= amount)
                self._free -= amount
        return amount

    def release(self, amount: int) -> None:
        """Give back what `acquire` returned."""
        if amount:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


class Buffers:
    """One worker's memory, kept from piece to piece: fresh pages cost as much as copying into them."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._kept: dict[str, Matrix] = {}

    def take(self, use: str, rows: int, row_bytes: int) -> Matrix:
        """A matrix [rows, row_bytes] of undefined content; the one taken before for the same use is over."""
        nbytes = rows * row_bytes
        if nbytes > self._nbytes:
            return np.empty((rows, row_bytes), np.uint8)
        if use not in self._kept:
            self._kept[use] = np.empty(self._nbytes, np.uint8)
        return self._kept[use][:nbytes].reshape(rows, row_bytes)


class PieceQueue:
    """Hands out pieces so that workers write to different files: the kernel lets one writer into a file at a time."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._waiting: dict[str, deque[Piece]] = {}
        for piece in pieces:
            self._waiting.setdefault(piece.file, deque()).append(piece)
        self._busy = dict.fromkeys(self._waiting, 0)
        self._lock = threading.Lock()

    def take(self, finished: Piece | None) -> Piece | None:
        """The next piece for the worker that finished `finished`, None when there is none left."""
        with self._lock:
            if finished is not None:
                self._busy[finished.file] -= 1
            if not self._waiting:
                return None
            file = min(self._waiting, key=self._busy.__getitem__)
            self._busy[file] += 1
            piece = self._waiting[file].popleft()
            if not self._waiting[file]:
                del self._waiting[file]
            return piece
