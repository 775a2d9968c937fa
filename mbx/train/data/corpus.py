"""Prepared data on disk: plain arrays of token ids, mapped into memory, with a digest of each.

FOLDER/tokens     uint32 [tokens]: ids, the highest bit where a token is learned
FOLDER/ends       int64 [examples + 1]: where each example begins and the last one ends
FOLDER/places     a line an example: the number of its source, and its place there
FOLDER/corpus.json
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError
from mbx.train.data.tokens import Example, ExampleSequence
from mbx.untrusted.small_files import digest_of, read_json

FORMAT = 1
_INDEX = "corpus.json"
_FILES = ("tokens", "ends", "places")
_LEARNED = np.uint32(1 << 31)
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Facts:
    """What was prepared. `silent`: examples without a token to learn. `rewritten`: chats of which the template shows
    turns otherwise once others follow. `largest`: the largest token id."""

    examples: int = 0
    tokens: int = 0
    learned: int = 0
    silent: int = 0
    rewritten: int = 0
    largest: int = -1


class Corpus(ExampleSequence):
    """Examples of a prepared folder."""

    def __init__(self, folder: Path, facts: Facts, digest: str, names: Sequence[str]) -> None:
        self.folder, self.facts, self.digest, self._names = folder, facts, digest, names
        self._tokens: npt.NDArray[np.uint32] = _mapped(folder / "tokens", np.uint32)
        self.ends: npt.NDArray[np.int64] = _mapped(folder / "ends", np.int64)

    def __len__(self) -> int:
        return self.facts.examples

    def at(self, number: int) -> Example:
        """Example `number`, copied out of the file."""
        coded = self._tokens[self.ends[number] : self.ends[number + 1]]
        return Example((coded & ~_LEARNED).astype(np.int64), (coded & _LEARNED) != 0)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.ends)

    def learned(self) -> npt.NDArray[np.int64]:
        """Learned tokens of each example, its first one left out: nothing predicts it."""
        counts = np.zeros(len(self), np.int64)
        step = max(1, _BLOCK // max(1, int(self.sizes.mean()) if len(self) else 1))
        for first in range(0, len(self), step):
            last = min(len(self), first + step)
            start, end = int(self.ends[first]), int(self.ends[last])
            marks = (self._tokens[start:end] & _LEARNED) != 0
            marks[self.ends[first:last][np.diff(self.ends[first : last + 1]) > 0] - start] = False
            sums = np.concatenate(([0], np.cumsum(marks)))
            counts[first:last] = sums[self.ends[first + 1 : last + 1] - start] - sums[self.ends[first:last] - start]
        return counts

    def place(self, at: int) -> str:
        """The file and line, or the like, of example `at`."""
        with (self.folder / "places").open(encoding="utf-8") as file:
            number, _, place = next(line for n, line in enumerate(file) if n == at).rstrip("\n").partition("\t")
        return f"{self._names[int(number)]}{place}"

    def beyond(self, vocab: int) -> int | None:
        """The first example with an id of `vocab` or above."""
        if self.facts.largest < vocab:
            return None
        for start in range(0, len(self._tokens), _BLOCK):
            ids = self._tokens[start : start + _BLOCK] & ~_LEARNED
            if (ids >= vocab).any():
                return int(np.searchsorted(self.ends, start + int((ids >= vocab).argmax()), "right")) - 1
        return None


class Writer:
    """Writes a corpus into a new folder, an example at a time; a sink of `write_examples`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ends = array("q", [0])
        self._learned = self._silent = self._rewritten = 0
        self._largest = -1
        self._tokens = (folder / "tokens").open("wb", buffering=_BLOCK)
        self._places = (folder / "places").open("w", encoding="utf-8", buffering=_BLOCK, newline="\n")

    def add(self, source: int, place: str, example: Example, rewritten: bool) -> None:
        """Append an example."""
        coded = example.tokens.astype(np.uint32)
        learned = int(example.learn[1:].sum())
        self._largest = max(self._largest, int(coded.max(initial=0)))
        coded[example.learn] |= _LEARNED
        self._tokens.write(coded.tobytes())
        self._ends.append(self._ends[-1] + len(coded))
        self._places.write(f"{source}\t{place}\n")
        self._learned += learned
        self._silent += not learned
        self._rewritten += rewritten

    def close(self) -> None:
        """Close the files, whatever came."""
        self._tokens.close()
        self._places.close()

    def finish(self) -> None:
        """Write what describes the files."""
        self.close()
        (self.folder / "ends").write_bytes(self._ends.tobytes())
        facts = Facts(len(self._ends) - 1, self._ends[-1], self._learned, self._silent, self._rewritten, self._largest)
        digests = {name: digest_of(self.folder / name) for name in _FILES}
        index = {"format": FORMAT, **asdict(facts), "sha256": digests}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def open_corpus(folder: Path, names: Sequence[str]) -> Corpus:
    """A prepared folder whose bytes are what its index says; StorageError where they are not. `names`: its sources."""
    try:
        index = read_json(folder / _INDEX)
        facts = Facts(**{key: int(index[key]) for key in Facts.__slots__})
        digests = index["sha256"]
        wrong = [name for name in _FILES if digests[name] != digest_of(folder / name)]
        if index["format"] != FORMAT or wrong:
            raise ValueError(f"{', '.join(wrong)} changed" if wrong else "it is of another release")
        corpus = Corpus(folder, facts, sha256(f"{digests['tokens']} {digests['ends']}".encode()).hexdigest(), names)
        if len(corpus.ends) != facts.examples + 1 or int(corpus.ends[-1]) != facts.tokens:
            raise ValueError("its parts do not fit each other")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the prepared data in `{folder}` cannot be used: {error}") from error
    return corpus


def _mapped(path: Path, kind: type[np.generic]) -> npt.NDArray:  # type: ignore[type-arg]
    """A file's array, not read into memory; an empty file cannot be mapped."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)
