"""From `data.path` to prepared examples: found by what is in the files, or made with all cores and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import UsageError
from mbx.train.data.cache import cached, make_room
from mbx.train.data.corpus import FORMAT, Corpus, Writer, open_corpus
from mbx.train.data.examples import Reading, Source, nothing_to_learn, shape_said, write_examples
from mbx.train.data.pictures import Eyes
from mbx.train.data.sources import open_sources
from mbx.train.data.tokens import marks_of
from mbx.train.model.sight import TEXT_ALONE
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_WORKERS = 16
#: What a tokenizer without a backend keeps of where it was read.
_PLACES = frozenset(("name_or_path", "vocab_file", "tokenizer_file"))


@dataclass(frozen=True, slots=True)
class Found:
    """Prepared examples, the shape of their records in words, and whether they were there before.

    `displaced`: older prepared data that went to make room, and its bytes.
    """

    corpus: Corpus
    shape: str
    kept: bool
    displaced: tuple[int, int] = (0, 0)


def prepare_corpus(
    data: Data,
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    eyes: Eyes | str = TEXT_ALONE,
) -> Found:
    """Prepared examples of what `places` name; `data.kind` is resolved. UsageError where they cannot be used.

    `vocab`: the model's rows; the tokenizer may know more tokens, as long as no example has one. `eyes`: what reads
    images, or why nothing does.
    """
    sources = open_sources(*places)
    names = [source.name for source in sources]
    reading = Reading.of(data, sources, tokenizer, eyes)
    key = _key(reading, sources)
    corpus, kept = cached(
        key,
        lambda folder: _make(sources, reading, folder),
        lambda folder: open_corpus(folder, names),
    )
    if not corpus.facts.learned:
        raise nothing_to_learn(", ".join(places))
    if (at := corpus.beyond(vocab)) is not None:
        largest = int(corpus[at].tokens.max())
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UsageError(
            f"{corpus.place(at)}: the token {token!r} has id {largest}, and the embedding {vocab} rows",
            hint="take it out of the data, or enlarge the model first: resize_token_embeddings in Transformers",
        )
    shape = shape_said(sources)[1] if reading.kind != "text" else "documents"
    return Found(corpus, shape, kept, (0, 0) if kept else make_room(key))


def _make(sources: Sequence[Source], reading: Reading, folder: Path) -> None:
    writer = Writer(folder)
    try:
        write_examples(sources, reading, writer, workers=min(_MOST_WORKERS, len(os.sched_getaffinity(0))))
        writer.finish()
    finally:
        writer.close()


def _key(reading: Reading, sources: Sequence[Source]) -> str:
    """SHA-256 of all that decides what the examples are."""
    marks = marks_of(reading.tokenizer)
    parts: dict[str, object] = {
        "format": FORMAT,
        "releases": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "sources": [(source.digest(), _suffix(source.name)) for source in sources],
        "kind": reading.kind,
        "learn": reading.learn if reading.template else "",
        "template": reading.template,
        "tokenizer": _digest_of(reading.tokenizer),
        "marks": [marks.special, marks.stops],
    }
    if isinstance(reading.eyes, Eyes):  # images are named by their path from the file
        parts["eyes"] = [reading.eyes.digest, *(os.path.realpath(source.name) for source in sources)]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _suffix(name: str) -> str:
    """A .txt file is one document, whatever is in it."""
    return "txt" if name.removesuffix(".gz").endswith(".txt") else ""


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    named = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    if getattr(tokenizer, "is_fast", False):
        text = tokenizer.backend_tokenizer.to_str()
    else:
        said = {key: value for key, value in tokenizer.init_kwargs.items() if key not in _PLACES}
        settings = json.dumps(said, sort_keys=True, default=str)
        text = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), settings])
    return sha256(f"{named}\n{text}".encode()).hexdigest()


def data_identity(data: Data, corpora: Sequence[Corpus]) -> str:
    """What a run is trained on, by content: SHA-256 of token ids and marks, and of what makes rows of them.

    `corpora`: one, or one for each of `data.weights`.

    Neither names of files nor their formats are part of it: the same chats in another folder are the same data.
    """
    order = [data.length, data.packs, data.too_long, data.shuffle, data.seed, data.eval_share]
    content = [data.kind == "text", order, *(corpus.digest for corpus in corpora), *data.weights]
    return sha256(json.dumps(content).encode()).hexdigest()
