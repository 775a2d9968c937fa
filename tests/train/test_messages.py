"""What a message may hold, the shapes that records have, and the errors about either; no template runs here."""

from __future__ import annotations

from typing import Any

import pytest

from converters.errors import MbxError, UnsupportedError
from mbx.train.data.messages import Conversation, conversation
from mbx.train.data.shapes import Chat, Completion, Document, read_record, shape_of

CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}
HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def talk(*messages: object, learn: str = "assistant", first: int = 0) -> Conversation:
    return conversation(list(messages), {"channel"}, learn, {}, first)


def test_keys_reach_the_template_but_weights_and_nulls() -> None:
    rich = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm", "channel": "x"}
    done = talk(HI, {**rich, "weight": 1, "name": None})
    assert done.messages == [HI, rich] and done.learned == [1]
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert talk(parts, HELLO).messages[0]["content"] == "ab"


def test_which_turns_are_learned() -> None:
    idle = {**HELLO, "weight": 0}
    assert talk(HI, idle, HI, HELLO).learned == [3] and talk(HI, idle, HI, HELLO).idle == [1]
    assert talk(HI, {**HELLO, "train": False}, HI, {**HELLO, "loss": 1}).learned == [3]
    assert talk(HI, HELLO, HI, HELLO, learn="last").learned == [3]
    assert talk(HI, HELLO, HI, HELLO, first=2).learned == [3]


@pytest.mark.parametrize(
    ("message", "fact", "hint"),
    [
        (
            {"role": "assistant", "content": "x", "reasonig_content": "y"},
            "message 1 has an unknown key",
            "reasoning_c",
        ),
        ({"role": "assistant", "content": "x", "tool_call": [CALL]}, "unknown key `tool_call`", "tool_calls"),
        ({"role": "assistant", "content": "x", "wieght": 0}, "unknown key", "weight"),
        ({"role": "asistant", "content": "x"}, "role 'asistant'", "assistant"),
        ({"role": "assistant", "content": " \n"}, "empty turn of the assistant", "weight"),
        ({"role": "assistant"}, "empty turn of the assistant", "weight"),
        ({"role": "user", "content": ""}, "empty turn of the user", ""),
        ({"role": "tool", "content": None}, "string `content`", ""),
        ({"role": "assistant", "content": 3}, "must have a string `content`", ""),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "part of type 'image'", "text alone"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "`weight` must be 0 or 1", ""),
        ({"role": "assistant", "content": "", "tool_calls": {"a": 1}}, "list of objects", ""),
        ({"from": "gpt", "value": "x"}, "string `role`", "conversations"),
        ("x", "message 1 must be an object", ""),
    ],
)
def test_a_wrong_message_is_named(message: object, fact: str, hint: str) -> None:
    with pytest.raises(MbxError) as caught:
        talk(HI, message)
    assert fact in caught.value.fact and hint in (caught.value.hint or "")


SHAPES: list[tuple[dict[str, Any], str, object]] = [
    ({"messages": [HI, HELLO], "id": 7, "source": "web"}, "chat", Chat([HI, HELLO], {})),
    (
        {
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": 0}],
            "system": "be",
        },
        "chat",
        Chat([{"role": "system", "content": "be"}, HI, {**HELLO, "weight": 0}], {}),
    ),
    ({"conversations": [HI, HELLO]}, "chat", Chat([HI, HELLO], {})),
    (
        {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}], "tools": "[]"},
        "chat",
        Chat(
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
                }
            ],
            {},
        ),
    ),
    ({"instruction": "hi", "input": "", "output": "hello"}, "chat", Chat([HI, HELLO], {})),
    (
        {"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "hello"]]},
        "chat",
        Chat([HI, HELLO, {"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}], {}),
    ),
    ({"prompt": "a", "completion": "b"}, "completion", Completion("a", "b")),
    ({"prompt": [HI], "completion": [HELLO]}, "completion", Chat([HI, HELLO], {}, 1)),
    ({"prompt": [HI], "completion": "hello"}, "completion", Chat([HI, HELLO], {}, 1)),
    ({"text": "x", "url": "y"}, "text", Document("x")),
    (
        {"messages": [HI], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}},
        "chat",
        Chat([HI], {"tools": [{"name": "f"}], "enable_thinking": False}),
    ),
]


@pytest.mark.parametrize(("record", "kind", "right"), SHAPES)
def test_shapes(record: dict[str, Any], kind: str, right: object) -> None:
    from mbx.train.data.shapes import NAMES

    assert NAMES[shape_of(record)][1] == kind and read_record(record, kind) == right


@pytest.mark.parametrize(
    ("record", "kind", "fact", "hint"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chat", "preference pairs", "messages"),
        ({"question": "a", "answer": "b"}, "chat", "'answer', 'question'", "messages"),
        ({"text": "x"}, "chat", "reads `messages`", "data.kind=text"),
        ({"messages": [HI]}, "completion", "`prompt` and `completion`", "data.kind=chat"),
        ({"messages": [HI]}, "text", "`text` must be a string", ""),
        ({"messages": [HI], "tool": [CALL]}, "chat", "unknown key `tool`", "tools"),
        ({"messages": [HI], "tools": "x"}, "chat", "no JSON", ""),
        ({"messages": [HI], "tools": {"a": 1}}, "chat", "list of objects", ""),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "chat", "from 'humn'", "human"),
        ({"conversations": [{"from": "human", "value": 3}]}, "chat", "turn 0", ""),
        ({"conversations": []}, "chat", "non-empty list", ""),
        ({"instruction": "a", "output": 3}, "chat", "`output` must be a string", ""),
    ],
)
def test_a_wrong_record_is_named(record: dict[str, Any], kind: str, fact: str, hint: str) -> None:
    with pytest.raises(MbxError) as caught:
        read_record(record, kind)
    assert fact in caught.value.fact and hint in (caught.value.hint or "")


def test_preferences_are_not_supported() -> None:
    with pytest.raises(UnsupportedError):
        shape_of({"chosen": [], "rejected": []})
