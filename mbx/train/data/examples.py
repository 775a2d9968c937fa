"""Examples: documents, chats and completions read from files, as token ids with a mark on those that are learned."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from queue import LifoQueue
from typing import TYPE_CHECKING, Any, Protocol, cast

from converters.errors import MbxError, UnsupportedError, UsageError
from mbx.train.data.messages import conversation
from mbx.train.data.pictures import Eyes, Shown
from mbx.train.data.shapes import NAMES, Chat, Completion, Document, read_record, shape_of
from mbx.train.data.sources import File, Saved, open_sources
from mbx.train.data.template_process import Template
from mbx.train.data.templates import template_text
from mbx.train.data.tokens import Encoder, Example, marks_of
from mbx.train.data.turns import NO_MARKS
from mbx.train.model.sight import TEXT_ALONE
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Records that go through together.
_TOGETHER = 32
Source = File | Saved


class Sink(Protocol):
    """Takes examples in the order of their records."""

    def add(self, source: int, place: str, example: Example, rewritten: bool) -> None:
        """An example of source number `source`, from its record at `place`."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How records become examples: everything that decides what they are."""

    kind: str
    learn: str
    template: str
    tokenizer: PreTrainedTokenizerBase
    eyes: Eyes | str = TEXT_ALONE

    @staticmethod
    def of(
        data: Data, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, eyes: Eyes | str = TEXT_ALONE
    ) -> Reading:
        """What `data` asks for; UsageError where chats have no template. `eyes`: what reads images, or why nothing."""
        needed = data.kind == "chat" or (data.kind == "completion" and _of_messages(sources))
        template = template_text(data.template, tokenizer) if needed else ""
        return Reading(data.kind, data.learn, template, tokenizer, eyes)


def _of_messages(sources: Sequence[Source]) -> bool:
    record = first_record(sources)
    return isinstance(record, dict) and any(isinstance(record.get(key), list) for key in ("prompt", "completion"))


def first_record(sources: Sequence[Source]) -> object:
    """The first record there is, None without any."""
    return next((record for source in sources for _, record in source.records()), None)


def shape_said(sources: Sequence[Source]) -> tuple[str, str]:
    """The kind that the first record asks for, and its shape in words."""
    for source in sources:
        for place, record in source.records():
            with placed(f"{source.name}{place}"):
                name, kind = NAMES[shape_of(_object(record))]
            return kind, name
    raise UsageError(f"`{sources[0].name}` holds no record")


def resolved(data: Data) -> Data:
    """`data` with its kind found in the first record where it is `auto`."""
    return of_kind(data, shape_said(open_sources(*data.places))[0]) if data.kind == "auto" else data


def of_kind(data: Data, kind: str) -> Data:
    """`data` with its kind, one of those that a recipe knows."""
    return replace(data, kind=cast(Any, kind))


def write_examples(sources: Sequence[Source], reading: Reading, sink: Sink, *, workers: int) -> None:
    """Give `sink` the examples of all records in their order; `workers` threads, each with a template's process."""
    encoder = Encoder(reading.tokenizer)
    marks = marks_of(reading.tokenizer) if reading.template else NO_MARKS
    templates: LifoQueue[Template | None] = LifoQueue()
    every = [Template(reading.tokenizer, reading.template, marks) for _ in range(workers if reading.template else 0)]
    for template in every:
        templates.put(template)
    if not every:  # the tokenizer is all there is to do, and has threads of its own
        templates.put(None)
    records = ((n, place, record) for n, source in enumerate(sources) for place, record in source.records())

    def work(part: list[tuple[int, str, object]]) -> list[tuple[int, str, Example, bool]]:
        template = templates.get()
        try:
            return _examples(part, sources, reading, encoder, template)
        finally:
            templates.put(template)

    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[list[tuple[int, str, Example, bool]]]] = deque()
            unread: MbxError | None = None
            while unread is None:
                part, unread = _together(records)
                if not part:
                    break
                waiting.append(pool.submit(work, part))
                if len(waiting) > 2 * workers:
                    _give(sink, waiting.popleft())
            while waiting:
                _give(sink, waiting.popleft())
            if unread is not None:
                raise unread
    finally:
        for template in every:
            template.close()


def _give(sink: Sink, part: Future[list[tuple[int, str, Example, bool]]]) -> None:
    for item in part.result():
        sink.add(*item)


def _together(records: Iterator[tuple[int, str, object]]) -> tuple[list[tuple[int, str, object]], MbxError | None]:
    """The next records, and why there are no more where one cannot be read: those before it may be wrong first."""
    part: list[tuple[int, str, object]] = []
    try:
        for item in islice(records, _TOGETHER):
            part.append(item)
    except MbxError as error:
        return part, error
    return part, None


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A chat as text, with spans of it, each learned or not; tokens of no span are not. `shown`: with its images."""

    text: str
    spans: Sequence[tuple[int, int, bool]]
    rewritten: bool
    shown: Shown | None = None


def _examples(
    part: Sequence[tuple[int, str, object]],
    sources: Sequence[Source],
    reading: Reading,
    encoder: Encoder,
    template: Template | None,
) -> list[tuple[int, str, Example, bool]]:
    """Examples of some records, in their order."""
    ready: list[_Drawn | Completion | Document] = []
    for number, place, record in part:
        with placed(f"{sources[number].name}{place}"):
            read = read_record(_object(record), reading.kind)
            source = sources[number]
            ready.append(_drawn(read, reading, template, source) if isinstance(read, Chat) else _whole(read))
    try:
        examples = _encoded(ready, encoder, reading.eyes)
    except UsageError:  # whose is it?
        for (number, place, _), one in zip(part, ready, strict=True):
            with placed(f"{sources[number].name}{place}"):
                _encoded([one], encoder, reading.eyes)
        raise
    changed = [isinstance(one, _Drawn) and one.rewritten for one in ready]
    places = [(number, place) for number, place, _ in part]
    return [(*where, one, count) for where, one, count in zip(places, examples, changed, strict=True)]


def _encoded(ready: Sequence[_Drawn | Completion | Document], encoder: Encoder, eyes: Eyes | str) -> list[Example]:
    """All at once: the tokenizer has threads of its own."""
    drawn = [one for one in ready if isinstance(one, _Drawn)]
    asked = [one for one in ready if isinstance(one, Completion)]
    told = [one.text for one in ready if isinstance(one, Document)]
    made = {
        _Drawn: iter(encoder.spans([one.text for one in drawn], [one.spans for one in drawn])),
        Completion: iter(encoder.completions([one.prompt for one in asked], [one.completion for one in asked])),
        Document: iter(encoder.documents(told)),
    }
    examples = [next(made[type(one)]) for one in ready]
    return [
        eyes.seen(example, one.shown) if isinstance(one, _Drawn) and one.shown and isinstance(eyes, Eyes) else example
        for one, example in zip(ready, examples, strict=True)
    ]


def _drawn(chat: Chat, reading: Reading, template: Template | None, source: Source) -> _Drawn:
    """A chat as its template draws it; the turns of `learn` are marked, or all but those of weight 0."""
    if template is None:
        raise UsageError(
            "the record has messages, and the first one had none: no chat template was asked for",
            hint="data.kind=chat, with all records in messages; or prompt and completion as text in all of them",
        )
    eyes = reading.eyes
    blind = "" if isinstance(eyes, Eyes) else eyes
    talk = conversation(chat.messages, template.names, reading.learn, chat.variables, chat.first, blind)
    every = reading.learn == "all"
    wanted = talk.idle if every else talk.learned
    done = template.turns(talk.messages, talk.variables, wanted)
    _encodable(done.text)
    spans = [(begin, end, not every) for begin, end in done.spans]
    spans = [(0, len(done.text), True), *spans] if every else spans
    if not talk.images or not isinstance(eyes, Eyes):
        return _Drawn(done.text, spans, done.rewritten)
    if isinstance(source, Saved):
        raise UnsupportedError(
            "images are named by their path from a file of records", hint="write the records as JSON lines beside them"
        )
    shown = eyes.show(done.text, spans, talk.images, source.path.parent)
    return _Drawn(shown.text, shown.spans, done.rewritten, shown)


def _whole(read: Completion | Document) -> Completion | Document:
    for text in (read.prompt, read.completion) if isinstance(read, Completion) else (read.text,):
        _encodable(text)
    if isinstance(read, Completion) and not read.completion:
        raise UsageError("`completion` is empty")
    return read


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Puts a place in front of what is said to be wrong."""
    try:
        yield
    except MbxError as error:
        raise type(error)(f"{place}: {error.fact}", hint=error.hint, details=error.details) from error


def _object(record: object) -> Mapping[str, object]:
    if not isinstance(record, dict):
        roles = isinstance(record, list) and record and isinstance(record[0], dict) and "role" in record[0]
        hint = 'a list of messages stands in an object: {"messages": […]}' if roles else None
        raise UsageError(f"a JSON object was expected, got {type(record).__name__}", hint=hint)
    return record


def _encodable(text: str) -> None:
    """UsageError where JSON has filled `text` with halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text has half a surrogate pair, {text[error.start]!r}") from error


def refuse_long(data: Data, long: Sequence[str], count: int) -> None:
    """UsageError where `count` examples are longer than a row, and that is an error; `long` names them."""
    if long and data.too_long == "error":
        raise UsageError(
            f"{count} example(s) are longer than data.length {data.length}",
            hint="raise data.length, or say data.too_long=drop or data.too_long=truncate",
            details=long,
        )


def nothing_to_learn(path: str) -> UsageError:
    """The error about data whose every token is a prompt."""
    return UsageError(f"`{path}` holds no example with a token to learn")
