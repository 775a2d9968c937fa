"""A recipe's data, read before anything is built: rows to train on, rows to validate on, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.errors import UsageError
from mbx.train.data.chosen import Chosen, Joined, choose
from mbx.train.data.corpora import Found, data_identity, prepare_corpus
from mbx.train.data.counts import Counts, Part, count_rows, no_epochs
from mbx.train.data.identity import indexed_identity
from mbx.train.data.mixture import Mixture
from mbx.train.data.pictures import Eyes
from mbx.train.data.rows import Pattern, Rows, check_indexed, example_rows
from mbx.train.model.blueprint import Blueprint, load_tokenizer
from mbx.train.model.sight import Sight, sight_of
from mbx.train.recipe.sections import Data, Recipe, places_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows, None where Megatron Core's datasets give them; for files, what they are and come to besides.

    `identity`: the data by its content (`data_identity`), empty where no file is read. `chosen`: the examples, of each
    place that has a weight, or of all. `eyes`: what reads the images of the rows, None where these have none.
    """

    train: Rows | None
    evaluation: Rows | None = None
    counts: Counts | None = None
    identity: str = ""
    chosen: Sequence[Chosen] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    eyes: Eyes | None = None


def read_data(recipe: Recipe, plan: Blueprint) -> Dataset:
    """The data of a recipe whose `data.kind` is resolved; MbxError says what is wrong with it, and where."""
    d = recipe.data
    if d.kind == "pattern":
        return Dataset(Pattern(plan.vocab, d.length, d.seed), Pattern(plan.vocab, d.length, d.seed + 1))
    if d.kind == "mock":
        return Dataset(None)
    if not d.places:
        name = "PREFIX, the files' path without .bin and .idx" if d.kind == "indexed" else "FILE.jsonl"
        raise UsageError(f"data.kind `{d.kind}` needs a file", hint=f"data={name}")
    if d.kind == "indexed":
        check_indexed(d)
        return Dataset(None, identity=indexed_identity(d.places, d.weights))
    return _of_examples(d, plan)


def _of_examples(d: Data, plan: Blueprint) -> Dataset:
    """Chats, completions and texts: each place that has a weight makes rows of its own."""
    tokenizer = load_tokenizer(plan)
    pad = int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))
    pad = min(pad, plan.vocab - 1)
    sight = sight_of(plan)
    eyes = Eyes(sight) if isinstance(sight, Sight) else sight

    def prepared(places: Sequence[str]) -> tuple[str, Found]:
        return ", ".join(places), prepare_corpus(d, places, tokenizer, plan.vocab, eyes)

    founds = [prepared(places) for places in ([(place,) for place in d.places] if d.weights else [d.places])]
    chosen = [choose(d, found.corpus, name, share=d.eval_share) for name, found in founds]
    held: Sequence[Chosen] = [held for _, held in chosen if held is not None]
    pictures = sum(found.corpus.facts.pictures for _, found in founds)
    if d.eval_path:
        name, found = prepared(places_of(d.eval_path))
        held = [choose(d, found.corpus, name)[0]]
        pictures += found.corpus.facts.pictures
    parts = [
        Part(name, found, mine, example_rows(d, mine, pad))
        for (name, found), (mine, _) in zip(founds, chosen, strict=True)
    ]
    mixture = Mixture([part.rows for part in parts], d.weights) if d.weights else None
    return Dataset(
        mixture or parts[0].rows,
        example_rows(d, Joined(held) if len(held) > 1 else held[0], pad) if held else None,
        count_rows(d.kind, parts, mixture, sum(map(len, held))),
        data_identity(d, [found.corpus for _, found in founds]),
        [mine for mine, _ in chosen],
        tokenizer,
        eyes if pictures and isinstance(eyes, Eyes) else None,
    )


def with_steps(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with its steps counted from `train.epochs`, if it says those; UsageError where data has none."""
    t = recipe.train
    if not t.epochs:
        return recipe
    if dataset.counts is None:
        raise no_epochs(recipe.data.kind)
    steps = dataset.counts.steps(t.epochs, t.global_batch)
    if recipe.optim.warmup_steps > steps:
        raise UsageError(
            f"optim.warmup_steps {recipe.optim.warmup_steps} exceed the {steps} steps of {t.epochs:g} epochs",
            hint="optim.warmup_fraction=0.05 warms up by share",
        )
    return replace(recipe, train=replace(t, steps=steps, epochs=0.0))
