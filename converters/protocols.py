"""What the engine asks of a storage format."""

from __future__ import annotations

from typing import Protocol

from converters.tensors import Chunk


class Source(Protocol):
    """Reads chunks of a checkpoint."""

    def data_start(self, chunk: Chunk) -> int:
        """Byte offset in `chunk.file` of the chunk's first data byte; StorageError when the container is invalid."""
        ...

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of `file`; StorageError when the file ends before."""
        ...


class Sink(Protocol):
    """Writes chunks of a checkpoint in place."""

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start` of `file`; StorageError when it cannot."""
        ...

    def data_start(self, chunk: Chunk) -> int:
        """Byte offset in `chunk.file` where the chunk's data begin."""
        ...

    def finish_chunk(self, dtype: str, chunk: Chunk, crc32: int) -> None:
        """Write what surrounds a chunk's data once its CRC-32 is known."""
        ...
