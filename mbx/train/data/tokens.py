"""Text to token ids, and spans of text to the tokens that hold them, for tokenizers of either kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError, UsageError
from mbx.train.data.turns import Marks
from mbx.untrusted.images import decoded, read_image
from mbx.untrusted.small_files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

Tokens = npt.NDArray[np.int64]
Learn = npt.NDArray[np.bool_]
#: [begin, end) of a text, and whether its tokens are learned.
Span = tuple[int, int, bool]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file as it was when data was prepared: SHA-256, bytes, and when it was written (nanoseconds); and the
    tokens that stand for it."""

    path: str
    sha256: str
    size: int
    written: int
    tokens: int = 0

    @property
    def unchanged(self) -> bool:
        """Whether the file looks as it did, without reading it."""
        try:
            found = Path(self.path).stat()
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.size, self.written)

    def read(self) -> Image:
        """The image; StorageError where its bytes are others by now."""
        data = read_image(Path(self.path))
        if sha256(data).hexdigest() != self.sha256:
            raise StorageError(f"the image `{self.path}` changed since the data was prepared", hint="‹resume›")
        return decoded(data, Path(self.path))


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one document, and which of them are learned (`learn[i]` for `tokens[i]`).

    `pictures`: its images, in order. `axes` [3, tokens]: positions by time, height and width, None where they count
    like text.
    """

    tokens: Tokens
    learn: Learn
    pictures: tuple[Picture, ...] = ()
    axes: Tokens | None = None


class ExampleSequence(Sequence[Example], ABC):
    """Examples that are made when they are asked for, one by its number from 0."""

    @abstractmethod
    def at(self, number: int) -> Example:
        """Example `number`, of 0 to the last."""

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self.at(number) for number in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self.at(at % len(self))


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Special tokens of a tokenizer, and where generation stops: its end token, and those of generation_config.json.

    Tokens that tokenizer.json marks as special and names nowhere else count: Transformers leaves them out of
    `all_special_tokens`.
    """
    added = tokenizer.added_tokens_decoder
    ends = {tokenizer.eos_token} if tokenizer.eos_token else set()
    for number in _generation_ends(Path(str(tokenizer.name_or_path or ""))):
        token = added[number].content if number in added else tokenizer.convert_ids_to_tokens(number)
        if isinstance(token, str) and token:
            ends.add(token)
    special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens) | ends
    return Marks(tuple(sorted(filter(None, special))), tuple(sorted(ends)))


def _generation_ends(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    found = read_json(path).get("eos_token_id")
    numbers = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise StorageError(f"`{path}`: eos_token_id must be token ids, got {found!r}")
    return numbers


class Encoder:
    """A tokenizer's encodings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._fast: Any = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._fast is not None:  # a setting of earlier callers would cut or pad every text
            self._fast.no_truncation()
            self._fast.no_padding()
        self._special = marks_of(tokenizer).pattern()

    def spans(self, texts: Sequence[str], marked: Sequence[Sequence[Span]]) -> list[Example]:
        """Examples of texts that hold their own special tokens; what `marked` says of a span holds for its tokens.

        A token that holds the end of a prompt and the beginning of a turn is learned.
        """
        if self._fast is None:
            return [self._slow(text, spans) for text, spans in zip(texts, marked, strict=True)]
        examples = []
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
        for text, spans, coded in zip(texts, marked, encodings, strict=True):
            tokens = np.asarray(coded.ids, np.int64)
            learn = np.zeros(len(tokens), bool)
            for begin, end, value in spans:
                first, last = _token(coded, range(begin, end)), _token(coded, range(end - 1, begin - 1, -1))
                if first is None or last is None:
                    raise UsageError(f"the tokenizer makes no token of {text[begin:end][:60]!r}")
                learn[first : last + 1] = value
            examples.append(Example(tokens, learn))
        return examples

    def _slow(self, text: str, spans: Sequence[Span]) -> Example:
        """Without offsets: a text begins with the tokens of its beginning, but for the last.

        Beginnings are taken from the special token before a boundary on, where a text that is cut there becomes the
        same tokens: then it is little more than one tokenisation, else one a boundary.
        """
        tokens = self._plain(text)
        starts = sorted({0, *(found.start() for found in self._special.finditer(text))})
        parts = [self._plain(text[one:two]) for one, two in pairwise([*starts, len(text)])]
        if [token for part in parts for token in part] != tokens:
            starts, parts = [0], [tokens]
        before = [0, *accumulate(map(len, parts))]

        def at(place: int) -> int:
            number = bisect_right(starts, place) - 1
            return before[number] + _alike(parts[number], self._plain(text[starts[number] : place]))

        learn = np.zeros(len(tokens), bool)
        for begin, end, value in spans:
            learn[at(begin) : at(end)] = value
        return Example(np.asarray(tokens, np.int64), learn)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def documents(self, texts: Sequence[str]) -> list[Example]:
        """Examples of plain text, learned whole, between the tokenizer's own marks and closed by its end token."""
        return [_learned(ids, 0) for ids in self.marked(texts)]

    def completions(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
        """Examples of prompts and the answers behind them, which are learned with the end token."""
        end = self.end()
        examples = []
        for front, back in zip(self.marked(prompts, closed=False), self._coded(answers, special=False), strict=True):
            back = back if back and back[-1] == end else [*back, end]
            examples.append(_learned([*front, *back], len(front)))
        return examples

    def marked(self, texts: Sequence[str], *, closed: bool = True) -> list[list[int]]:
        """Ids with the tokenizer's own marks around them, none of which is doubled where the text has it already."""
        start = self.tokenizer.bos_token_id
        end = self.end() if closed else self.tokenizer.eos_token_id
        out = []
        for ids in self._coded(texts, special=True):
            if start is not None and ids[:2] == [start, start]:
                del ids[0]
            while ids and end is not None and ids[-1] == end:
                ids.pop()  # some tokenizers close every text
            out.append([*ids, end] if closed else ids)
        return out

    def _coded(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        coded = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []
        return [list(ids) for ids in coded]

    def end(self) -> int:
        """The tokenizer's end token; UsageError where it has none."""
        if self.tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-sequence token")
        return int(self.tokenizer.eos_token_id)


def _token(coded: Any, places: Sequence[int]) -> int | None:
    """The first token, in the order of `places`, that holds one of these characters: normalisers drop some."""
    return next((found for place in places if (found := coded.char_to_token(place)) is not None), None)


def _alike(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((n for n, (one, two) in enumerate(zip(tokens, others, strict=False)) if one != two), len(others))


def _learned(ids: list[int], since: int) -> Example:
    learn = np.zeros(len(ids), bool)
    learn[since:] = True
    return Example(np.asarray(ids, np.int64), learn)
