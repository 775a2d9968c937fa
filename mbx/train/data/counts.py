"""What a data set comes to: examples, tokens, rows, padding; and steps for a number of epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.errors import UsageError
from mbx.text import human_bytes, plural
from mbx.train.data.chosen import Chosen
from mbx.train.data.corpora import Found
from mbx.train.data.mixture import Mixture
from mbx.train.data.rows import Examples, Stream


@dataclass(frozen=True, slots=True)
class Part:
    """What is trained on of a place, or of several that are read as one: prepared, chosen, and in rows."""

    name: str
    found: Found
    chosen: Chosen
    rows: Examples | Stream


@dataclass(frozen=True, slots=True)
class Share:
    """A place with a weight: its rows, and how many of an epoch's are its own."""

    place: str
    rows: int
    rows_an_epoch: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the rows to train on. `shape`: of their records, in words. `rows` and `padding_tokens`, places of rows that
    hold no token, are an epoch's. `rewritten`: chats of which the template shows turns otherwise once others follow.
    `silent`: examples that have no token to learn. `pictured`: examples with images, of which the data has `pictures`,
    of so many tokens together and at most, and in a row at most. `mixture`: places that have a weight. `displaced`:
    older prepared data that went to make room in the cache."""

    kind: str
    shape: str
    examples: int
    tokens: int
    learned_tokens: int
    rows: int
    padding_tokens: int
    dropped: int
    cut: int
    silent: int
    rewritten: int
    held_out: int
    from_cache: bool
    mixture: tuple[Share, ...] = ()
    displaced: int = 0
    displaced_bytes: int = 0
    pictured: int = 0
    pictures: int = 0
    picture_tokens: int = 0
    largest_picture: int = 0
    row_picture_tokens: int = 0

    def steps(self, epochs: float, global_batch: int) -> int:
        """Steps in which `epochs` passes are over, the last one filled up."""
        return max(1, math.ceil(round(epochs * self.rows / global_batch, 6)))

    def epochs(self, steps: int, global_batch: int) -> float:
        """Passes over the data in so many steps."""
        return steps * global_batch / self.rows

    def lines(self, steps: int, global_batch: int, length: int) -> Iterator[str]:
        """What a person reads."""
        yield (
            f"data: {plural(self.examples, 'example')} ({self.kind}, read from {self.shape}), "
            f"{plural(self.tokens, 'token')}, {self.learned_tokens:,} of them learned"
        )
        share, epochs = self.padding_tokens / (self.rows * length), self.epochs(steps, global_batch)
        yield (
            f"{plural(self.rows, 'row')} of {length} tokens, {share:.1%} padding; {plural(steps, 'step')} of "
            f"{global_batch} rows are {epochs:.4g} epochs"
        )
        if self.pictures:
            yield (
                f"{plural(self.pictures, 'image')} in {plural(self.pictured, 'example')}, "
                f"{plural(self.picture_tokens, 'token')}: {self.picture_tokens / self.pictures:.4g} an image, "
                f"{self.largest_picture} at most, none of them learned"
            )
        for one in self.mixture:
            passes = epochs * one.rows_an_epoch / one.rows
            yield f"{one.rows_an_epoch / self.rows:.1%} of the rows are from {one.place}: {passes:.4g} passes over it"
        for count, what in (
            (self.held_out, "held out for validation"),
            (self.dropped, "longer than a row and dropped"),
            (self.cut, "longer than a row and cut"),
            (self.silent, "without a token to learn"),
            (self.rewritten, "with turns that the template shows otherwise once others follow, learned as shown"),
        ):
            if count:
                yield f"{plural(count, 'example')} {what}"
        if self.displaced:
            freed = human_bytes(self.displaced_bytes)
            yield f"{plural(self.displaced, 'older data set')} of {freed} went from the cache (MBX_CACHE_MAX)"


def count_rows(kind: str, parts: Sequence[Part], mixture: Mixture | None, held_out: int) -> Counts:
    """What `parts` come to; `mixture`: of which they are."""
    shares = mixture.counts if mixture else [part.rows.count for part in parts]
    padding = [_padding(part) * share / part.rows.count for part, share in zip(parts, shares, strict=True)]
    facts = [part.found.corpus.facts for part in parts]
    return Counts(
        kind,
        ", ".join(dict.fromkeys(part.found.shape for part in parts)),
        examples=sum(len(part.chosen) for part in parts),
        tokens=sum(int(part.chosen.sizes.sum()) for part in parts),
        learned_tokens=sum(part.chosen.learned for part in parts),
        rows=sum(shares),
        padding_tokens=round(sum(padding)),
        dropped=sum(part.chosen.dropped for part in parts),
        cut=sum(part.chosen.cut for part in parts),
        silent=sum(fact.silent for fact in facts),
        rewritten=sum(fact.rewritten for fact in facts),
        held_out=held_out,
        from_cache=all(part.found.kept for part in parts),
        mixture=tuple(
            Share(part.name, part.rows.count, share) for part, share in zip(parts, shares, strict=True) if mixture
        ),
        displaced=sum(part.found.displaced[0] for part in parts),
        displaced_bytes=sum(part.found.displaced[1] for part in parts),
        pictured=sum(fact.pictured for fact in facts),
        pictures=sum(fact.pictures for fact in facts),
        picture_tokens=sum(fact.picture_tokens for fact in facts),
        largest_picture=max((fact.largest_picture for fact in facts), default=0),
        row_picture_tokens=max(map(_in_a_row, parts), default=0),
    )


def _in_a_row(part: Part) -> int:
    """The most tokens of images in a row of a part."""
    if isinstance(part.rows, Stream) or not part.found.corpus.facts.pictures:
        return 0
    counts = part.found.corpus.picture_tokens()[part.chosen.numbers]
    return max(int(counts[list(numbers)].sum()) for numbers in part.rows.packs)


def _padding(part: Part) -> int:
    """Places without a token in the rows of a part."""
    if isinstance(part.rows, Stream):
        return 0
    tokens = int(part.chosen.sizes.sum())
    return part.rows.count * part.rows.length - (tokens - len(part.chosen))


def no_epochs(kind: str) -> UsageError:
    """The error about epochs of data that has none."""
    return UsageError(f"data.kind `{kind}` has no epochs to count", hint="train.steps=N")
