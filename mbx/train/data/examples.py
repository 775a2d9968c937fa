"""Examples: documents, chats and completions read from files, as token ids with a mark on those that are learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError, UsageError
from mbx.train.data.template_process import Template, opened
from mbx.train.recipe.sections import Data
from mbx.untrusted.small_files import read_small

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = npt.NDArray[np.int64]
#: A data file is held in memory: what memory there is bounds it.
_MOST_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one document, and which of them are learned (`learn[i]` for `tokens[i]`)."""

    tokens: Tokens
    learn: npt.NDArray[np.bool_]


def read_examples(data: Data, path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Examples of a JSONL (or, for `text`, a .txt) file; a bad line is a UsageError that names its number."""
    if data.kind == "text" and path.suffix == ".txt":
        return [_text(_read(path), tokenizer)]
    if data.kind == "chat":
        with opened(tokenizer) as template:
            return _read_lines(data, path, lambda record: _chat(record, tokenizer, template))
    make: dict[str, Callable[[Mapping[str, object]], Example]] = {
        "completion": lambda record: _completion(record, tokenizer),
        "text": lambda record: _text(_string(record, "text"), tokenizer),
    }
    return _read_lines(data, path, make[data.kind])


def _read_lines(data: Data, path: Path, make: Callable[[Mapping[str, object]], Example]) -> list[Example]:
    """An example of every line that is not empty."""
    examples, long = [], []
    for number, line in enumerate(_read(path).split("\n"), 1):  # splitlines() also cuts at U+2028, which JSON allows
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise UsageError(f"a JSON object was expected, got {type(record).__name__}")
            example = make(record)
        except UsageError as error:
            raise UsageError(f"{path}:{number}: {error.fact}", hint=error.hint) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not valid JSON: {error}") from error
        if len(example.tokens) > data.length + 1 and data.kind != "text":
            long.append(f"{path}:{number}: {len(example.tokens)} tokens")
            if data.too_long == "truncate":
                examples.append(Example(example.tokens[: data.length + 1], example.learn[: data.length + 1]))
            continue
        examples.append(example)
    if long and data.too_long == "error":
        raise UsageError(
            f"{len(long)} example(s) are longer than data.length {data.length}",
            hint="raise data.length, or say data.too_long=drop or data.too_long=truncate",
            details=long,
        )
    if not any(example.learn[1:].any() for example in examples):
        raise UsageError(f"`{path}` holds no example with a token to learn")
    return examples


def _read(path: Path) -> str:
    try:
        # "-sig": without the mark that some editors put in front
        return read_small(path, _MOST_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise StorageError(f"cannot read the data file `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise StorageError(f"{path}:{number}: not UTF-8: {error.reason}") from error


def _encodable(text: str) -> str:
    """`text`, which JSON may have filled with halves of surrogate pairs; UsageError if so."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text has half a surrogate pair, {text[error.start]!r}") from error
    return text


def _string(record: Mapping[str, object], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        have = ", ".join(map(repr, sorted(record))) or "nothing"
        raise UsageError(f"`{key}` must be a string; the line has {have}")
    return _encodable(value)


def _text(text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    tokens = [*_encode(tokenizer, text, special=True), _end(tokenizer)]
    return Example(np.asarray(tokens, np.int64), np.ones(len(tokens), bool))


def _completion(record: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt = _encode(tokenizer, _string(record, "prompt"), special=True)
    answer = [*_encode(tokenizer, _string(record, "completion"), special=False), _end(tokenizer)]
    learn = np.zeros(len(prompt) + len(answer), bool)
    learn[len(prompt) :] = True
    return Example(np.asarray(prompt + answer, np.int64), learn)


def _chat(record: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, template: Template) -> Example:
    """The template's rendering of `messages`; assistant turns are learned, up to and with the token that ends them.

    Where a turn lies is found by rendering the conversation once more with that turn replaced: whatever the template
    does to turns (trim them, drop their reasoning) needs no knowledge here.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError("`messages` must be a non-empty list")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UsageError(f"message {at} must have a string `role` and `content`")

    def render(turns: list[dict[str, str]]) -> str:
        return _encodable(template.render(turns))

    text = render(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special = set(tokenizer.all_special_ids)
    learn = np.zeros(len(tokens), bool)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Two private-use characters, so that no real text shares a prefix or a suffix with the mark.
        marked = render([*messages[:at], {**message, "content": "\ue000\ue001"}, *messages[at + 1 :]])
        head, tail = (len(commonprefix(pair)) for pair in ((text, marked), (text[::-1], marked[::-1])))
        begin, end = head, max(head, len(text) - tail)
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
        learn[inside] = True
        after = inside[-1] + 1 if inside else len(tokens)
        if after < len(tokens) and tokens[after] in special:
            learn[after] = True
    return Example(np.asarray(tokens, np.int64), learn)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    tokens = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if special and tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()  # some tokenizers close every text; the end is added once, by the caller
    return tokens


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-sequence token")
    return int(tokenizer.eos_token_id)
