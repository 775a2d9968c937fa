"""Prepared data on disk: plain arrays of token ids, mapped into memory, with a digest of each.

FOLDER/tokens     uint32 [tokens]: ids, the highest bit where a token is learned
FOLDER/ends       int64 [examples + 1]: where each example begins and the last one ends
FOLDER/places     a line an example: the number of its source, and its place there
FOLDER/pictures   a line of JSON an image: path, SHA-256, bytes, when it was written
FOLDER/axes       int32 [3, tokens] of an example whose tokens stand by time, height and width
FOLDER/sights     int64 [examples + 1, 2]: where each example's bytes of `pictures` and numbers of `axes` begin
FOLDER/corpus.json
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError
from mbx.train.data.tokens import Example, ExampleSequence, Picture
from mbx.untrusted.small_files import digest_of, read_json

FORMAT = 2
_INDEX = "corpus.json"
_FILES = ("tokens", "ends", "places", "pictures", "axes", "sights")
_LEARNED = np.uint32(1 << 31)
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Facts:
    """What was prepared. `silent`: examples without a token to learn. `rewritten`: chats of which the template shows
    turns otherwise once others follow. `largest`: the largest token id. `pictured`: examples with images, of which
    there are `pictures` of so many tokens together, the `largest_picture` of so many alone."""

    examples: int = 0
    tokens: int = 0
    learned: int = 0
    silent: int = 0
    rewritten: int = 0
    largest: int = -1
    pictured: int = 0
    pictures: int = 0
    picture_tokens: int = 0
    largest_picture: int = 0


class Corpus(ExampleSequence):
    """Examples of a prepared folder."""

    def __init__(self, folder: Path, facts: Facts, digest: str, names: Sequence[str]) -> None:
        self.folder, self.facts, self.digest, self._names = folder, facts, digest, names
        self._tokens: npt.NDArray[np.uint32] = mapped(folder / "tokens", np.uint32)
        self.ends: npt.NDArray[np.int64] = mapped(folder / "ends", np.int64)
        self._sights: npt.NDArray[np.int64] = mapped(folder / "sights", np.int64).reshape(-1, 2)
        self._axes: npt.NDArray[np.int32] = mapped(folder / "axes", np.int32)
        self._lines: npt.NDArray[np.uint8] = mapped(folder / "pictures", np.uint8)

    def __len__(self) -> int:
        return self.facts.examples

    def at(self, number: int) -> Example:
        """Example `number`, copied out of the file."""
        coded = self._tokens[self.ends[number] : self.ends[number + 1]]
        (line, axis), (line_end, axis_end) = self._sights[number : number + 2].tolist()
        axes = self._axes[axis:axis_end].astype(np.int64).reshape(3, -1) if axis_end > axis else None
        pictures = _pictures(self._lines[line:line_end].tobytes())
        return Example((coded & ~_LEARNED).astype(np.int64), (coded & _LEARNED) != 0, pictures, axes)

    @property
    def pictured(self) -> npt.NDArray[np.bool_]:
        """Which examples have images."""
        return np.diff(self._sights[:, 0]) > 0

    def pictures(self) -> Iterator[Picture]:
        """Every image, in the order of the examples."""
        starts = np.unique(self._sights[:, 0])
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            yield from _pictures(self._lines[start:end].tobytes())

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.ends)

    def picture_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of images in each example."""
        counts = np.zeros(len(self), np.int64)
        for at in np.flatnonzero(self.pictured):
            counts[at] = sum(one.tokens for one in self.at(int(at)).pictures)
        return counts

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
        self._sights = array("q", [0, 0])
        self._learned = self._silent = self._rewritten = self._pictured = 0
        self._shown: list[int] = []
        self._largest = -1
        self._tokens = (folder / "tokens").open("wb", buffering=_BLOCK)
        self._places = (folder / "places").open("w", encoding="utf-8", buffering=_BLOCK, newline="\n")
        self._pictures = (folder / "pictures").open("wb", buffering=_BLOCK)
        self._axes = (folder / "axes").open("wb", buffering=_BLOCK)

    def add(self, source: int, place: str, example: Example, rewritten: bool) -> None:
        """Append an example."""
        coded = example.tokens.astype(np.uint32)
        learned = int(example.learn[1:].sum())
        self._largest = max(self._largest, int(coded.max(initial=0)))
        coded[example.learn] |= _LEARNED
        self._tokens.write(coded.tobytes())
        self._ends.append(self._ends[-1] + len(coded))
        self._places.write(f"{source}\t{place}\n")
        lines = b"".join(json.dumps(astuple(one)).encode() + b"\n" for one in example.pictures)
        axes = b"" if example.axes is None else example.axes.astype(np.int32).tobytes()
        self._pictures.write(lines)
        self._axes.write(axes)
        self._sights.extend((self._sights[-2] + len(lines), self._sights[-1] + len(axes) // 4))
        self._pictured += bool(lines)
        self._shown += [one.tokens for one in example.pictures]
        self._learned += learned
        self._silent += not learned
        self._rewritten += rewritten

    def close(self) -> None:
        """Close the files, whatever came."""
        self._tokens.close()
        self._places.close()
        self._pictures.close()
        self._axes.close()

    def finish(self) -> None:
        """Write what describes the files."""
        self.close()
        (self.folder / "ends").write_bytes(self._ends.tobytes())
        (self.folder / "sights").write_bytes(self._sights.tobytes())
        facts = Facts(
            *(len(self._ends) - 1, self._ends[-1], self._learned, self._silent, self._rewritten, self._largest),
            *(self._pictured, len(self._shown), sum(self._shown), max(self._shown, default=0)),
        )
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
        parts = [digests["tokens"], digests["ends"]]
        corpus = Corpus(folder, facts, "", names)
        if facts.pictures:  # by what they show, wherever they lie
            parts += [one.sha256 for one in corpus.pictures()]
        corpus.digest = sha256(" ".join(parts).encode()).hexdigest()
        if len(corpus.ends) != facts.examples + 1 or int(corpus.ends[-1]) != facts.tokens:
            raise ValueError("its parts do not fit each other")
        if other := next((one.path for one in corpus.pictures() if not one.unchanged), None):
            raise ValueError(f"the image `{other}` changed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the prepared data in `{folder}` cannot be used: {error}") from error
    return corpus


def _pictures(lines: bytes) -> tuple[Picture, ...]:
    return tuple(Picture(*json.loads(line)) for line in lines.splitlines())


def mapped(path: Path, kind: type[np.generic]) -> npt.NDArray:  # type: ignore[type-arg]
    """A file's array, not read into memory; an empty file cannot be mapped."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)
