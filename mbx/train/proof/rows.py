"""What rows hold, and rows that must teach the same as others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mbx.train.data.rows import Row, pack
from mbx.train.data.tokens import Picture, Tokens
from mbx.train.recipe.sections import Train


@dataclass(frozen=True, slots=True)
class Fixed:
    """Rows in hand, again and again."""

    rows: Sequence[Row]

    def row(self, index: int) -> Row:
        """Row `index`."""
        return self.rows[index % len(self.rows)]


@dataclass(frozen=True, slots=True)
class Held:
    """One example as row number `row` holds it: tokens, and which of them are learned.

    `faults`: labels that are not the next token, positions that do not count from 0. `pictures` and `axes` are its
    part of the row's.
    """

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]
    row: int
    faults: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    axes: Tokens | None = None


def held(rows: Sequence[Row]) -> list[Held]:
    """The examples of rows, in order; rows without a token to learn and padding hold none."""
    return [one for number, row in enumerate(rows) for one in _of_row(number, row)]


def _of_row(number: int, row: Row) -> list[Held]:
    out, start = [], 0
    filled = len(row.tokens) if row.filled is None else row.filled
    for number_within, length in enumerate(row.lengths or (filled,)):
        end = start + length
        if start >= filled:
            break
        tokens, labels = row.tokens[start:end], row.labels[start:end]
        faults = []
        if not np.array_equal(tokens[1:], labels[:-1]):
            faults.append("labels are not the next tokens")
        if not np.array_equal(row.positions[start:end], np.arange(length)):
            faults.append("positions do not count from 0")
        learn = (False, *(bool(value) for value in row.mask[start:end]))
        pictures = row.pictures[number_within] if row.pictures else ()
        axes = None if row.axes is None else row.axes[:, start:end]
        out.append(Held((*map(int, tokens), int(labels[-1])), learn, number, tuple(faults), pictures, axes))
        start = end
    if row.mask[filled:].any():
        out.append(Held((), (), number, ("padding is learned",)))
    return [one for one in out if one.faults or any(one.learn)]


def weights(examples: Sequence[Held], rows: int, train: Train) -> list[float]:
    """What a token of each example weighs in the loss of a step over so many `rows`."""
    if train.per_token_loss:
        return [1.0 / sum(sum(one.learn) for one in examples)] * len(examples)
    micro = [one.row // train.micro_batch for one in examples]
    tokens = {n: sum(sum(o.learn) for o, m in zip(examples, micro, strict=True) if m == n) for n in set(micro)}
    return [1.0 / (tokens[n] * (rows // train.micro_batch)) for n in micro]


def made(examples: Sequence[Held], length: int, pad: int, *, packed: bool) -> list[Row]:
    """Rows of `length` of examples, several a row where `packed`; apart from `mbx.train.data`, which is looked at."""
    packs = pack([len(one.tokens) - 1 for one in examples], length) if packed else [[n] for n in range(len(examples))]
    rows = []
    for numbers in packs:
        tokens, labels = np.full(length, pad, np.int64), np.full(length, pad, np.int64)
        mask, positions, lengths, at = np.zeros(length, np.float32), np.zeros(length, np.int64), [], 0
        here = [examples[n] for n in numbers]
        turned = any(one.axes is not None for one in here)
        axes = np.zeros((3, length), np.int64)
        for one in here:
            count = len(one.tokens) - 1
            place = slice(at, at + count)
            tokens[place], labels[place], mask[place] = one.tokens[:-1], one.tokens[1:], one.learn[1:]
            positions[place] = np.arange(count)
            axes[:, place] = positions[place] if one.axes is None else one.axes
            lengths.append(count)
            at += count
        if at < length:
            positions[at:] = np.arange(length - at)
            axes[:, at:] = positions[at:]
            lengths.append(length - at)
        pictures = tuple(one.pictures for one in here)
        row = Row(tokens, labels, mask, positions, tuple(lengths) if packed else (), at if at < length else None)
        rows.append(replace(row, pictures=pictures, axes=axes if turned else None))
    return rows


def longer(rows: Sequence[Row], more: int) -> list[Row]:
    """The same rows with `more` tokens of padding behind each."""
    out = []
    for row in rows:
        count = len(row.tokens)
        filled = count if row.filled is None else row.filled
        had = count - filled  # padding that is there already is one segment with the new
        lengths = row.lengths and (*(row.lengths[:-1] if had else row.lengths), had + more)
        positions = np.concatenate((row.positions[:filled], np.arange(had + more)))
        values = {
            name: np.concatenate((getattr(row, name), np.zeros(more, getattr(row, name).dtype)))
            for name in ("tokens", "labels", "mask")
        }
        axes = row.axes
        if axes is not None:
            axes = np.concatenate((axes[:, :filled], np.broadcast_to(np.arange(had + more), (3, had + more))), axis=1)
        out.append(
            replace(row, **values, positions=positions, lengths=tuple(lengths), filled=filled, axes=axes)  # type: ignore[arg-type]
        )
    return out


def noised(rows: Sequence[Row], vocab: int) -> list[Row]:
    """The same rows with other tokens in the padding, and other labels wherever none is learned."""
    rng = np.random.default_rng(0)
    out = []
    for row in rows:
        tokens, labels = row.tokens.copy(), row.labels.copy()
        if row.filled is not None:
            tokens[row.filled :] = rng.integers(vocab, size=len(tokens) - row.filled)
        idle = row.mask == 0
        labels[idle] = rng.integers(vocab, size=int(idle.sum()))
        out.append(replace(row, tokens=tokens, labels=labels))
    return out


def silenced(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The first row's last learned run made of weight 0; and how many tokens that were."""
    first, *others = rows
    learned = np.flatnonzero(first.mask)
    gaps = np.flatnonzero(np.diff(learned) > 1)
    turn = learned[gaps[-1] + 1 :] if len(gaps) else learned
    mask = first.mask.copy()
    mask[turn] = 0
    return [replace(first, mask=mask), *others], len(turn)


def filled_up(rows: Sequence[Row], unit: int) -> list[Row]:
    """Rows in a multiple of `unit`, the last of them without a token to learn."""
    out = list(rows)
    while len(out) % unit:
        out.append(replace(out[0], mask=np.zeros_like(out[0].mask)))
    return out
