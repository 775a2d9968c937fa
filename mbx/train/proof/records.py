"""What the first records of the data are to a tokenizer and its template alone, without `mbx.train.data`'s rendering.

Chats go through `apply_chat_template`. A turn is learned from behind the generation prompt to the last special token
of what the turn adds to the conversation before it. Where a later turn changes what stands before it, its content is
found by rendering the conversation with a mark in its place. Where neither says where a turn lies, there is no mask
here: `learn` is None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from mbx.train.data.calls import forms
from mbx.train.data.sources import File, Saved, open_sources
from mbx.train.recipe.sections import Data

if TYPE_CHECKING:
    import torch

#: Where a place has no more records.
_NONE = object()
#: In place of a turn's content.
_MARK = "\u2042mark\u2042"


@dataclass(frozen=True, slots=True)
class Record:
    """Tokens of a record, and which are learned: None where this derivation cannot say.

    `pictures`: paths of its images, and `inputs` what Transformers' class takes of them.
    """

    tokens: tuple[int, ...]
    learn: tuple[bool, ...] | None
    pictures: tuple[str, ...] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


def first_records(
    data: Data, count: int, carry: Callable[[object, File | Saved], object] = lambda record, source: record
) -> list[str]:
    """The first `count` records as lines of JSON, as `carry` makes them of a source's; of places that have weights,
    the first of each in turn."""
    groups = [(place,) for place in data.places] if data.weights else [data.places]
    each = [
        (carry(record, source) for source in open_sources(*places) for _, record in source.records())
        for places in groups
    ]
    turns = (record for turn in zip_longest(*each, fillvalue=_NONE) for record in turn if record is not _NONE)
    return [json.dumps(record, ensure_ascii=False) for record in islice(turns, count)]


def records(
    data: Data, lines: Sequence[str], tokenizer: Any, look: Callable[[Mapping[str, Any]], Record | None] | None = None
) -> list[Record]:
    """The records that rows are made of; longer ones left out or cut as `data.too_long` says. `look` makes those that
    show images, and None of others."""
    out, length = [], data.length
    for line in map(json.loads, lines):
        messages, first = messages_of(line)
        if messages is None:
            record = _completion(line, tokenizer)
        else:
            seen = None if look is None else look(line)
            record = chat_record(messages, first, line, tokenizer, data.learn) if seen is None else seen
        if len(record.tokens) > length + 1:
            if data.too_long != "truncate":
                continue
            cut = record.learn and record.learn[: length + 1]
            record = Record(record.tokens[: length + 1], cut)  # those that show images are not cut
        out.append(record)
    return out


def windows(data: Data, tokenizer: Any, count: int) -> list[Record]:
    """The first `count` rows of texts that are laid end to end, each closed by an end token."""
    stream: list[int] = []
    end, length = tokenizer.eos_token_id, data.length
    for source in open_sources(*data.places):
        for _, record in source.records():
            if len(stream) > count * length:
                break
            ids = tokenizer(record["text"])["input_ids"] if isinstance(record, dict) else []
            stream += [*(ids[:-1] if ids and ids[-1] == end else ids), end]
    cut = [tuple(stream[at * length : at * length + length + 1]) for at in range(count)]
    return [Record(tokens, (True,) * len(tokens)) for tokens in cut]


def _completion(line: Mapping[str, Any], tokenizer: Any) -> Record:
    prompt = tokenizer(line["prompt"])["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    answer = [*tokenizer(line["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Record((*prompt, *answer), (*(False,) * len(prompt), *(True,) * len(answer)))


def messages_of(line: Mapping[str, Any]) -> tuple[list[dict[str, Any]] | None, int]:
    """A record's messages and how many of them are the prompt alone; None for strings of prompt and completion."""
    if isinstance(line.get("messages"), list):
        return line["messages"], 0
    if isinstance(turns := line.get("conversations") or line.get("conversation"), list):
        if "role" in turns[0]:
            return turns, 0
        system = [{"role": "system", "content": line["system"]}] if line.get("system") else []
        return [*system, *(_spoken(turn) for turn in turns)], 0
    if "instruction" in line:
        asked = "\n\n".join(part for part in (line["instruction"], line.get("input") or "") if part.strip())
        past = [
            {"role": role, "content": content}
            for pair in line.get("history") or []
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        system = [{"role": "system", "content": line["system"]}] if line.get("system") else []
        now = [{"role": "user", "content": asked}, {"role": "assistant", "content": line["output"]}]
        return [*system, *past, *now], 0
    prompt, completion = line["prompt"], line["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return None, 0
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return [*before, *after], len(before)


def _spoken(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    more = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call":
        calls = json.loads(turn["value"])
        made = [
            {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in (calls if isinstance(calls, list) else [calls])
        ]
        return {"role": "assistant", "content": None, "tool_calls": made, **more}
    if turn["from"] in ("user", "human", "prompter", "system"):
        return {"role": "system" if turn["from"] == "system" else "user", "content": turn["value"], **more}
    tools = ("tool", "observation", "function_response", "function-response")
    return {"role": "tool" if turn["from"] in tools else "assistant", "content": turn["value"], **more}


def _taken(plain: list[dict[str, Any]], text: Callable[[Sequence[object]], str]) -> tuple[list[dict[str, Any]], str]:
    """The messages with arguments of calls as objects, as servers make them, or as text where the template joins them,
    and what it renders."""
    from jinja2 import TemplateError

    *others, last = forms(plain)
    for form in others:
        try:
            return [dict(message) for message in form], text(form)
        except (TemplateError, TypeError):
            continue
    return [dict(message) for message in last], text(last)


def chat_record(
    messages: Sequence[Mapping[str, Any]], first: int, line: Mapping[str, Any], tokenizer: Any, learned: str
) -> Record:
    """A chat's messages, of which those from `first` on may be learned."""
    more = {**(line.get("chat_template_kwargs") or {})}
    more |= {key: line[key] for key in ("tools", "documents") if line.get(key)}
    plain = [{k: v for k, v in message.items() if k not in ("weight", "train", "loss")} for message in messages]

    def text(turns: Sequence[object], prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **more))

    plain, whole = _taken(plain, text)
    direct = tuple(tokenizer.apply_chat_template(plain, return_dict=False, **more))
    if not tokenizer.is_fast:
        return Record(direct, None)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = tuple(encoded["input_ids"]), encoded["offset_mapping"]
    if direct != tokens:  # Transformers' own ids are the reference, however they came about
        return Record(direct, None)
    if learned == "all":
        return Record(tokens, (True,) * len(tokens))
    special, learn = set(tokenizer.all_special_ids), [False] * len(tokens)
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for at, message in enumerate(messages):
        if learned == "last" and at != last:
            continue
        weight = next((message[k] for k in ("weight", "train", "loss") if k in message), 1)
        if message["role"] != "assistant" or not weight or at < first:
            continue
        if at == 0:  # no prompt of its own to stand behind
            return Record(tokens, None)
        before, upto = text(plain[:at], True), text(plain[: at + 1])
        if whole.startswith(upto) and upto.startswith(before):
            begin, close, run_on = len(before), len(upto), False
        elif (found := _marked(plain, at, whole, text)) is not None:
            (begin, close), run_on = found, True
        else:
            return Record(tokens, None)
        inside = [n for n, (start, stop) in enumerate(offsets) if start < close and stop > begin]
        ends = [n for n in inside if tokens[n] in special]
        if run_on:  # behind the content: to the first special token there
            ends = [next((n for n in range(len(tokens)) if offsets[n][0] >= close and tokens[n] in special), -1)]
            if ends[0] < 0:
                return Record(tokens, None)
            inside = [n for n, (_, stop) in enumerate(offsets) if stop > begin]
        for n in inside:
            learn[n] = n <= ends[-1] if ends else True
    return Record(tokens, tuple(learn))


def _marked(
    plain: Sequence[Mapping[str, Any]], at: int, whole: str, text: Callable[..., str]
) -> tuple[int, int] | None:
    """Where turn `at` begins in the whole text, behind its generation prompt, and where its content ends."""
    content = plain[at].get("content")
    if not isinstance(content, str) or not content.strip() or plain[at].get("tool_calls"):
        return None
    content = content.strip()
    rendered = text([*plain[:at], {**plain[at], "content": _MARK}, *plain[at + 1 :]])
    place = rendered.find(_MARK)
    bare, asked = text(plain[:at]), text(plain[:at], True)
    prompt = asked[len(bare) :] if asked.startswith(bare) else ""
    begin = whole.rfind(prompt, 0, place)
    if (
        place < 0
        or not prompt
        or begin < 0
        or whole[:place] != rendered[:place]
        or not whole.startswith(content, place)
    ):
        return None
    return begin + len(prompt), place + len(content)
