"""The shapes that people's records have, each told by its keys and turned into the one that is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from converters.errors import UnsupportedError, UsageError
from mbx.text import near_miss

#: Who speaks, in ShareGPT's words and in those of its kin.
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function-response"), "tool"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("function_call",), "function_call"),
}
#: Shape → what it is called, and the kind of data that reads it.
NAMES = {
    "chat": ("chats of `messages`", "chat"),
    "sharegpt": ("ShareGPT `conversations`", "chat"),
    "alpaca": ("Alpaca's `instruction`, `input`, `output`", "chat"),
    "completion": ("`prompt` and `completion`", "completion"),
    "text": ("documents of `text`", "text"),
}
_BESIDE = ("tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Chat:
    """A record's messages, not yet checked; those before `first` are the prompt alone."""

    messages: object
    variables: Mapping[str, object]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and what is learned behind it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Document:
    """Text that is learned whole."""

    text: str


def shape_of(record: Mapping[str, object]) -> str:
    """The shape of a record by its keys; UsageError where it has none, UnsupportedError for preference pairs."""
    keys = {key for key, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        raise UnsupportedError(
            "the records are preference pairs (`chosen`, `rejected`); mbx trains on one answer a record",
            hint='write the answer to learn as {"messages": […]}; preferences need another trainer (DPO)',
        )
    if "messages" in keys:
        return "chat"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "text" in keys:
        return "text"
    have = ", ".join(map(repr, sorted(record))) or "nothing"
    raise UsageError(
        f"no shape of data that is known: the record has {have}",
        hint='{"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …} or {"text": …}',
    )


def read_record(record: Mapping[str, object], kind: str) -> Chat | Completion | Document:
    """A record of whatever shape as `kind` (chat, completion, text) is trained; UsageError where it is of another."""
    if kind == "text":
        return Document(_string(record, "text"))
    shape = shape_of(record)
    if NAMES[shape][1] != kind:
        wanted = {"chat": "`messages`", "completion": "`prompt` and `completion`"}[kind]
        raise UsageError(
            f"data.kind {kind} reads {wanted}, and the record is of {NAMES[shape][0]}",
            hint=f"data.kind={NAMES[shape][1]} reads it",
        )
    variables = _variables(record)
    if shape == "chat":
        return Chat(record["messages"], variables)
    if shape == "sharegpt":
        return Chat(_sharegpt(record), variables)
    if shape == "alpaca":
        return Chat(_alpaca(record), variables)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return Chat([*before, *after], variables, len(before))
    return Completion(_string(record, "prompt"), _string(record, "completion"))


def _variables(record: Mapping[str, object]) -> dict[str, object]:
    """What a template is given beside the messages."""
    for key in record:
        if key in _BESIDE or record[key] is None:
            continue
        for near in get_close_matches(key, _BESIDE, 1, 0.85):
            if record.get(near) is None:
                raise UsageError(f"the record has an unknown key `{key}`", hint=f"did you mean {near}?")
    found: dict[str, object] = {}
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():  # tables keep lists of unlike objects as text
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UsageError(f"`tools` is a string and no JSON: {error}") from error
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UsageError("`tools` must be a list of objects, as JSON schemas of functions")
        found["tools"] = tools
    if record.get("documents"):
        found["documents"] = record["documents"]
    more = record.get("chat_template_kwargs") or {}
    if not isinstance(more, dict) or {"messages", "add_generation_prompt", "chat_template"} & set(more):
        raise UsageError("`chat_template_kwargs` must be an object of the template's own switches")
    return found | more


def _sharegpt(record: Mapping[str, object]) -> object:
    turns = record.get("conversations") or record.get("conversation")
    if not isinstance(turns, list) or not turns:
        raise UsageError("`conversations` must be a non-empty list")
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return turns
    messages: list[object] = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for at, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise UsageError(f"turn {at} of `conversations` must have `from` and `value`")
        role = _SPEAKERS.get(turn["from"])
        if role is None:
            hint = near_miss(turn["from"], _SPEAKERS, f"known: {', '.join(_SPEAKERS)}")
            raise UsageError(f"turn {at} of `conversations` is from {turn['from']!r}", hint=hint)
        if not isinstance(turn.get("value"), str | list):
            raise UsageError(f"turn {at} of `conversations` must have a string `value`")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append(_called(at, turn) | rest if role == "function_call" else {**_said(role, turn), **rest})
    return messages


def _said(role: str, turn: Mapping[str, object]) -> dict[str, object]:
    return {"role": role, "content": turn["value"]}


def _called(at: int, turn: Mapping[str, object]) -> dict[str, object]:
    """A call written as JSON text: a name and its arguments."""
    try:
        call = json.loads(str(turn["value"]))
    except ValueError as error:
        raise UsageError(f"turn {at} of `conversations` is a function_call and no JSON: {error}") from error
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
        raise UsageError(f"turn {at} of `conversations`: a function_call has `name` and `arguments`")
    made = [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]
    return {"role": "assistant", "content": None, "tool_calls": made}


def _alpaca(record: Mapping[str, object]) -> object:
    asked, more = _string(record, "instruction"), record.get("input") or ""
    if not isinstance(more, str):
        raise UsageError("`input` must be a string")
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UsageError("`history` must be a list of pairs of a question and its answer")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    user = f"{asked}\n\n{more}" if more.strip() else asked
    return [*messages, {"role": "user", "content": user}, {"role": "assistant", "content": _string(record, "output")}]


def _string(record: Mapping[str, object], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        have = ", ".join(map(repr, sorted(record))) or "nothing"
        raise UsageError(f"`{key}` must be a string; the record has {have}")
    return value
