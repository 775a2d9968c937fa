"""Rows of tokens: packed examples, text laid end to end, Megatron Core's own datasets.

Row `i` of a run depends on the recipe alone, so a run resumes by counting. Every rank holds the same rows and takes
its own share of each step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError, UsageError
from mbx.train.data.chosen import Chosen, Joined
from mbx.train.data.tokens import Example, Picture, Tokens
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Heard:
    """What a teacher says of a row's tokens: its k likeliest `tokens` and their `logprobs`, both [length, k], and the
    logarithm of what all others have together, `rest` [length]."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a micro-batch; all arrays are [length].

    `mask`: 1 where the label counts. `lengths`: tokens of each packed segment, padding included as the last one;
    empty where the row is one sequence. `filled`: tokens before the padding, None where there is none. `pictures`:
    the images of each example, in order; `axes` [3, length]: positions by time, height and width, None where none has
    others than `positions`. `heard`: a teacher's words, where they lie on disk.
    """

    tokens: Tokens
    labels: Tokens
    mask: npt.NDArray[np.float32]
    positions: Tokens
    lengths: tuple[int, ...] = ()
    filled: int | None = None
    pictures: tuple[tuple[Picture, ...], ...] = ()
    axes: Tokens | None = None
    heard: Heard | None = None


class Rows(Protocol):
    """An endless, addressable sequence of rows."""

    def row(self, index: int) -> Row:
        """Row `index` of the run."""
        ...


@dataclass(frozen=True, slots=True)
class Pattern:
    """Rows that count up in steps of their own: a sequence any model learns within a few steps."""

    vocab: int
    length: int
    seed: int

    def row(self, index: int) -> Row:
        """Row `index`: start and step drawn from the seed and the index."""
        rng = np.random.default_rng((self.seed, index))
        start, step = int(rng.integers(self.vocab)), int(rng.integers(1, 4))
        stream = (start + step * np.arange(self.length + 1)) % self.vocab
        return _plain(stream.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of examples, shuffled anew each epoch; `packs[r]` lists the examples of row `r`.

    `packed`: rows hold several examples, whose attention must be kept apart.
    """

    examples: Sequence[Example]
    packs: Sequence[Sequence[int]]
    length: int
    pad: int
    shuffle: bool
    seed: int
    packed: bool

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return len(self.packs)

    def row(self, index: int) -> Row:
        """Row `index` of the run, epochs one after the other."""
        at = _place(index, len(self.packs), self.seed if self.shuffle else None)
        tokens = np.full(self.length, self.pad, np.int64)
        labels = np.full(self.length, self.pad, np.int64)
        mask, positions = np.zeros(self.length, np.float32), np.zeros(self.length, np.int64)
        lengths, start = [], 0
        here = [self.examples[number] for number in self.packs[at]]
        axes = None if all(example.axes is None for example in here) else np.zeros((3, self.length), np.int64)
        for example in here:
            count = len(example.tokens) - 1
            place = slice(start, start + count)
            tokens[place], labels[place] = example.tokens[:-1], example.tokens[1:]
            mask[place], positions[place] = example.learn[1:], np.arange(count)
            if axes is not None:
                axes[:, place] = positions[place] if example.axes is None else example.axes[:, :count]
            lengths.append(count)
            start += count
        filled = start if start < self.length else None
        if filled is not None:
            positions[start:] = np.arange(self.length - start)
            lengths.append(self.length - start)
            if axes is not None:
                axes[:, start:] = positions[start:]
        pictures = tuple(example.pictures for example in here)
        return Row(tokens, labels, mask, positions, tuple(lengths) if self.packed else (), filled, pictures, axes)


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows cut from all documents laid end to end, each closed by an end token; the row order is shuffled.

    `ends` [documents + 1]: where each begins in the whole.
    """

    examples: Sequence[Example]
    ends: Tokens
    length: int
    shuffle: bool
    seed: int

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return (int(self.ends[-1]) - 1) // self.length

    def row(self, index: int) -> Row:
        """Row `index`: `length + 1` consecutive tokens."""
        start = _place(index, self.count, self.seed if self.shuffle else None) * self.length
        return _plain(self._cut(start, start + self.length + 1))

    def _cut(self, start: int, end: int) -> Tokens:
        """Tokens [start, end) of the whole."""
        first, last = np.searchsorted(self.ends, (start, end - 1), "right") - 1
        found = np.concatenate([self.examples[at].tokens for at in range(first, last + 1)])
        begin = start - int(self.ends[first])
        return found[begin : begin + end - start]

    def rest(self) -> Row | None:
        """What is left behind the last whole row, padded with its last token; None where nothing is."""
        left = self._cut(self.count * self.length, int(self.ends[-1]))
        if (count := len(left) - 1) < 1:
            return None
        row = _plain(np.concatenate((left, np.full(self.length - count, left[-1]))))
        return replace(row, mask=(np.arange(self.length) < count).astype(np.float32), filled=count)


@dataclass(frozen=True, slots=True)
class Megatron:
    """Rows of a Megatron Core GPTDataset, in its order."""

    dataset: Sequence[Mapping[str, torch.Tensor]]

    def row(self, index: int) -> Row:
        """Sample `index`."""
        sample = self.dataset[index]
        tokens, labels, mask, positions = (
            sample[name].numpy() for name in ("tokens", "labels", "loss_mask", "position_ids")
        )
        return Row(tokens.astype(np.int64), labels.astype(np.int64), mask.astype(np.float32), positions)


def _place(index: int, count: int, seed: int | None) -> int:
    """Where row `index` of a run stands among `count`, which each epoch shuffles anew; None: in order."""
    epoch, at = divmod(index, count)
    return at if seed is None else int(_order(seed, epoch, count)[at])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tokens:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _plain(stream: Tokens) -> Row:
    count = len(stream) - 1
    return Row(stream[:-1], stream[1:], np.ones(count, np.float32), np.arange(count))


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Fill rows of `length` with items of `sizes`, longest first into the fullest row that has room.

    Every item is in one row; the result depends on the sizes alone.
    """
    rooms: dict[int, list[int]] = {}  # free tokens -> rows
    free: list[int] = []  # keys of `rooms`, ascending
    rows: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[item]
        if (at := bisect_left(free, size)) == len(free):
            row, best = len(rows), length
            rows.append([])
        else:
            best = free[at]
            row = rooms[best].pop()
            if not rooms[best]:
                del rooms[best], free[at]
        rows[row].append(item)
        if (left := best - size) not in rooms:
            rooms[left] = []
            insort(free, left)
        rooms[left].append(row)
    return rows


def example_rows(data: Data, examples: Sequence[Example], pad: int) -> Examples | Stream:
    """Rows of `examples` as `data` asks: a stream for text, packed or single rows otherwise."""
    known = examples.sizes if isinstance(examples, Chosen | Joined) else [len(example.tokens) for example in examples]
    sizes = np.asarray(known, np.int64)
    if data.kind == "text":
        ends = np.concatenate(([0], np.cumsum(sizes)))
        if ends[-1] <= data.length:
            raise UsageError(f"the text has {ends[-1]} tokens, fewer than one row of data.length {data.length}")
        return Stream(examples, ends, data.length, data.shuffle, data.seed)
    packs = pack((sizes - 1).tolist(), data.length) if data.pack else [[i] for i in range(len(sizes))]
    return Examples(examples, packs, data.length, pad, data.shuffle, data.seed, data.pack)


def check_indexed(data: Data) -> None:
    """StorageError where one of the two files that a place of `data.path` is short for is not there."""
    for path in (place + suffix for place in data.places for suffix in (".idx", ".bin")):
        if not Path(path).is_file():
            raise StorageError(f"`{path}` does not exist", hint="data.path is the files' path without .bin and .idx")


def megatron_rows(data: Data, vocab: int, num_train: int, num_eval: int) -> tuple[Rows, Rows | None]:
    """Train and validation rows of Megatron Core's GPTDataset over `.bin`/`.idx` files, or of its mock documents.

    Several files are blended by their weights, as `--data-path` blends them; without weights, by their sizes. The
    order is Megatron-LM's for the same seed, length and numbers of samples. Collective.
    """
    from mbx.models.megatron.core.datasets import (
        BlendedMegatronDatasetBuilder,
        GPTDataset,
        GPTDatasetConfig,
        MockGPTDataset,
        NullTokenizer,
    )

    class Indexed(GPTDataset):  # type: ignore[misc]
        """Refuses documents without tokens, of which Megatron Core would count epochs without end."""

        def _get_num_tokens_per_epoch(self) -> int:
            found: int = super()._get_num_tokens_per_epoch()
            if not found:
                raise StorageError(
                    f"`{self.dataset_path}` has no tokens for {self.index_split.name}, of data.split={data.split}",
                    hint="data.split=1,0,0 trains on everything",
                )
            return found

    mock = data.kind == "mock"
    if not mock:
        check_indexed(data)
    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=data.length,
        blend=None if mock else (list(data.places), list(data.weights) or None),
        split=None if mock else data.split,
        path_to_cache=None,
        tokenizer=NullTokenizer(data.null_vocab_size or vocab - 1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # every rank builds its own: the index of a mock or a memory-mapped file is cheap
    train, valid, _ = BlendedMegatronDatasetBuilder(
        MockGPTDataset if mock else Indexed, [num_train, num_eval, 0], lambda: True, config
    ).build()
    if train is None:
        raise UsageError(f"data.split={data.split} leaves no documents to train on", hint="data.split=1,0,0")
    return Megatron(train), None if valid is None else Megatron(valid)


def micro_batches(
    rows: Rows, step: int, *, global_batch: int, micro_batch: int, dp: int, dp_rank: int
) -> Iterator[list[Row]]:
    """This rank's micro-batches of 0-based `step`: rows are dealt to ranks as Megatron-LM's sampler deals them."""
    first = step * global_batch
    for start in range(first, first + global_batch, micro_batch * dp):
        mine = start + dp_rank * micro_batch
        yield [rows.row(index) for index in range(mine, mine + micro_batch)]
