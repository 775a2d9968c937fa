"""Whether the ranks of a legacy checkpoint agree wherever several of them hold the same values.

Norms and routers lie in every tensor-parallel rank's file, dense weights in every expert-parallel rank's, a tied
embedding in two pipeline stages'. A copy that differs is a fault of the training run, and no choice of one is right.
The checksums that torch.save writes into an archive's directory settle it without a read; bytes are compared only
where those differ, as they do when a tensor is a view of a larger storage.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import StorageError
from converters.tensors import nbytes_of
from mbx.formats.legacy.assembly import Shard
from mbx.torchfile.archive import file_reader, read_directory
from mbx.untrusted.small_files import open_regular

_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Copy:
    """A rank's shard of `tensor`, with the words that name the rank."""

    tensor: str
    rank: str
    shard: Shard


class Copies:
    """Compares shards that should hold the same values; archives are opened as they are asked for. `close` it."""

    def __init__(self, iteration: Path) -> None:
        self.iteration = iteration
        self._open: dict[str, int] = {}
        self._checksums: dict[str, Mapping[str, tuple[int, int]]] = {}

    def close(self) -> None:
        """Close the archives."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def check(self, copies: Sequence[Copy]) -> None:
        """StorageError, naming the tensor and both ranks, where one of `copies` differs from the first."""
        first = copies[0]
        for other in copies[1:]:
            if other.shard.file == first.shard.file and other.shard.start == first.shard.start:
                continue
            if (what := self._difference(first.shard, other.shard)) is not None:
                names = f"`{first.tensor}`" if first.tensor == other.tensor else f"`{first.tensor}`, `{other.tensor}`"
                raise StorageError(
                    f"`{self.iteration}`: {names} should be the same on {first.rank} and {other.rank}, and {what}",
                    hint="the ranks drifted apart in training: load it in Megatron-LM and look at the run",
                    details=[f"{copy.rank}: {copy.shard.file}" for copy in (first, other)],
                )

    def _difference(self, one: Shard, other: Shard) -> str | None:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"is {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        mine, theirs = self._checksum(one), self._checksum(other)
        if one.inside == other.inside and mine == theirs and mine[1]:
            return None
        nbytes = nbytes_of(one.dtype, one.shape)
        for at in range(0, nbytes, _BLOCK):
            count = min(_BLOCK, nbytes - at)
            if self._bytes(one, at, count) != self._bytes(other, at, count):
                return "its values differ"
        return None

    def _checksum(self, shard: Shard) -> tuple[int, int]:
        """Bytes and CRC-32 of the storage that holds a shard; a CRC of 0 is one that was not computed."""
        if shard.file not in self._checksums:
            path = self.iteration / shard.file
            fd = self._fd(shard.file)
            entries = read_directory(file_reader(fd), os.fstat(fd).st_size, source=str(path))
            self._checksums[shard.file] = {
                entry.name.partition("/data/")[2]: (entry.nbytes, entry.crc32) for entry in entries
            }
        return self._checksums[shard.file].get(shard.storage, (0, 0))

    def _bytes(self, shard: Shard, at: int, count: int) -> bytes:
        data = os.pread(self._fd(shard.file), count, shard.start + at)
        if len(data) != count:
            raise StorageError(f"`{self.iteration / shard.file}` ends within a tensor", hint="copy the file again")
        return data

    def _fd(self, file: str) -> int:
        if file not in self._open:
            try:
                self._open[file] = open_regular(self.iteration / file)
            except OSError as error:
                raise StorageError(f"`{self.iteration / file}` cannot be opened: {error.strerror}") from error
        return self._open[file]
