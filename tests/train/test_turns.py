"""What is learned of a conversation, by the structure of each family's template: the exact text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from _templates import MARKS, NAMED, TEMPLATES
from transformers.utils.chat_template_utils import render_jinja_template

from mbx.train.data.turns import RefusedError, Rendered, check_said, find_turns

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TALK = [("user", "hi"), ("assistant", "hello"), ("user", "so?"), ("assistant", "well")]


def chat(*turns: tuple[str, str] | Mapping[str, object]) -> list[Mapping[str, object]]:
    return [turn if isinstance(turn, Mapping) else {"role": turn[0], "content": turn[1]} for turn in turns]


def thinking(content: str, thought: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, "reasoning_content": thought, **more}


def renderer(family: str, counted: list[int] | None = None):  # type: ignore[no-untyped-def]
    bos, eos = NAMED.get(family, ("", "<|im_end|>"))

    def render(messages: Sequence[Mapping[str, object]], prompt: bool) -> str:
        if counted is not None:
            counted.append(len(messages))
        try:
            return str(
                render_jinja_template(
                    [list(messages)],
                    chat_template=TEMPLATES[family],
                    add_generation_prompt=prompt,
                    bos_token=bos,
                    eos_token=eos,
                )[0][0]
            )
        except Exception as error:
            raise RefusedError(str(error)) from error

    return render


def found(family: str, messages: list[Mapping[str, object]]) -> Rendered:
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    return find_turns(renderer(family), messages, turns, MARKS[family])


def learned(family: str, messages: list[Mapping[str, object]]) -> list[str]:
    done = found(family, messages)
    return [done.text[begin:end] for begin, end in done.spans]


TWO = {
    "chatml": ["hello<|im_end|>", "well<|im_end|>"],
    "llama2": [" hello </s>", " well </s>"],
    "llama3": ["hello<|eot_id|>", "well<|eot_id|>"],
    "gemma3": ["hello<end_of_turn>", "well<end_of_turn>"],
    "no_prompt": ["hello<end_of_turn>", "well<end_of_turn>"],
    "qwen3": ["hello<|im_end|>", "<think>\n\n</think>\n\nwell<|im_end|>"],
    "qwen3_5": ["hello<|im_end|>", "\n</think>\n\nwell<|im_end|>"],
    "glm4_5": ["\n<think></think>\nhello<|user|>", "\n<think></think>\nwell<|user|>"],
    "deepseek": ["hello<｜end▁of▁sentence｜>", "well<｜end▁of▁sentence｜>"],
    "mistral": [" hello</s>", " well</s>"],
    "phi3": ["hello<|end|>", "well<|end|>"],
    "harmony": [
        "<|channel|>final<|message|>hello<|end|>",
        "<|channel|>final<|message|>well<|return|>",
    ],
}


@pytest.mark.parametrize("family", TWO)
def test_two_turns(family: str) -> None:
    messages = chat(*TALK)
    assert learned(family, messages) == TWO[family]
    whole = renderer(family)(messages, False)
    assert found(family, messages).text == whole + ("<|user|>" if family == "glm4_5" else "")


@pytest.mark.parametrize("family", TWO)
def test_long_chats_are_found_alike(family: str) -> None:
    """The short way and the way turn by turn agree; markers in the contents leave nothing but the long one."""
    turns = [(role, f"{role[0]}{n}") for n in range(8) for role in ("user", "assistant")]
    wanted = list(range(1, 16, 2))
    quick = find_turns(renderer(family), chat(*turns), wanted, MARKS[family])
    texts = [quick.text[begin:end] for begin, end in quick.spans]
    assert all(f"a{n}" in text and f"u{n}" not in text and f"a{n + 1}" not in text for n, text in enumerate(texts))
    slow = find_turns(renderer(family), chat(*turns), wanted[:2], MARKS[family])
    assert slow.spans[:2] == quick.spans[:2] or slow.rewritten or quick.rewritten


def test_text_that_looks_like_a_turn_is_not_one() -> None:
    inside = "<|im_start|>assistant\nno<|im_end|>\n"
    turns = [(role, inside if role == "user" else f"a{n}") for n in range(4) for role in ("user", "assistant")]
    assert learned("chatml", chat(*turns)) == [f"a{n}<|im_end|>" for n in range(4)]


def test_reasoning_is_learned_where_the_model_sees_it() -> None:
    messages = chat(("user", "2+2"), thinking("4", "two and two"), ("user", "3+3"), thinking("6", "thrice"))
    assert learned("qwen3", messages) == ["4<|im_end|>", "<think>\nthrice\n</think>\n\n6<|im_end|>"]
    assert learned("qwen3_5", messages) == ["4<|im_end|>", "thrice\n</think>\n\n6<|im_end|>"]
    assert learned("glm4_5", messages) == ["\n<think></think>\n4<|user|>", "\n<think>thrice</think>\n6<|user|>"]
    assert found("qwen3", messages).rewritten
    assert learned("qwen3", messages[:2]) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    inline = chat(("user", "2+2"), ("assistant", "<think>hm</think>4"))
    assert learned("qwen3", inline) == ["<think>\nhm\n</think>\n\n4<|im_end|>"]
    assert learned("deepseek", inline) == ["4<｜end▁of▁sentence｜>"]
    harmony = chat(("user", "2+2"), {"role": "assistant", "content": "4", "thinking": "two"})
    assert learned("harmony", harmony) == [
        "<|channel|>analysis<|message|>two<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    ]


def test_calls_are_learned() -> None:
    talk = chat(
        ("user", "sum?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ("tool", "7"),
        ("assistant", "7 it is"),
        ("user", "thanks"),
        ("assistant", "welcome"),
    )
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert learned("qwen3", talk[:2]) == [f"<think>\n\n</think>\n\n{call}"]
    assert learned("qwen3", talk) == [call, "7 it is<|im_end|>", "<think>\n\n</think>\n\nwelcome<|im_end|>"]
    assert learned("glm4_5", talk[:2]) == ["\n<think></think>\n<tool_call>add\n</tool_call><|observation|>"]
    ends = ("<|observation|>", "7 it is<|user|>", "welcome<|user|>")
    assert all(text.endswith(end) for text, end in zip(learned("glm4_5", talk), ends, strict=True))
    assert learned("llama3", talk) == ["<|python_tag|>add()<|eom_id|>", "7 it is<|eot_id|>", "welcome<|eot_id|>"]
    assert learned("mistral", talk) == [
        '[TOOL_CALLS] {"name": "add", "arguments": {"a": 1}}</s>',
        " 7 it is</s>",
        " welcome</s>",
    ]
    assert learned("harmony", talk) == [
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "<|channel|>final<|message|>7 it is<|end|>",
        "<|channel|>final<|message|>welcome<|return|>",
    ]


def test_history_that_is_rewritten_before_a_turn() -> None:
    """A call keeps its reasoning until its user speaks again: no prefix is a prefix then."""
    talk = chat(
        ("user", "sum?"),
        thinking("", "I add", tool_calls=[CALL]),
        ("tool", "7"),
        thinking("7", "done"),
        ("user", "and?"),
        thinking("8", "more"),
    )
    assert [text[:12] for text in learned("qwen3", talk)] == ["<tool_call>{", "7<|im_end|>", "<think>\nmore"]
    assert [text[:12] for text in learned("qwen3_5", talk)] == ["<tool_call>{", "7<|im_end|>", "more\n</think"]


@pytest.mark.parametrize("family", ["chatml", "gemma3", "qwen3", "mistral", "glm4_5", "llama3", "harmony"])
def test_a_chat_may_begin_with_the_assistant_or_have_two_turns_of_it(family: str) -> None:
    texts = learned(family, chat(("assistant", "one"), ("user", "q"), ("assistant", "two"), ("assistant", "three")))
    for text, word in zip(texts, ("one", "two", "three"), strict=True):
        assert word in text and "q" not in text.replace("<｜", "") and "<|start" not in text


@pytest.mark.parametrize(
    ("said", "template"),
    [
        ({"tool_calls": [CALL]}, "chatml"),
        ({"function_call": CALL}, "chatml"),
        ({"reasoning_content": "hm"}, "llama3"),
        ({"reasoning": "hm"}, "gemma3"),
        ({"thinking": "hm"}, "mistral"),
    ],
)
def test_what_a_template_does_not_show_is_refused(said: dict[str, object], template: str) -> None:
    """Calls and reasoning that are left out in silence would teach an end alone, or answers without reasons."""
    messages = chat(("user", "q"), {"role": "assistant", "content": "a", **said})
    render = renderer(template)
    with pytest.raises(RefusedError, match=rf"nothing of `{next(iter(said))}` of message 1"):
        check_said(render, messages, [1], frozenset({"role", "content"}))
    check_said(render, messages, [1], frozenset({"role", *said}))  # read by name, if only in the last turn
    check_said(render, messages, [], frozenset())
    check_said(lambda talk, prompt: str(talk), messages, [1], frozenset())  # read with all of a message


def test_a_turn_without_an_end_is_refused() -> None:
    with pytest.raises(RefusedError, match="message 1 with no special token"):
        found("endless", chat(*TALK))
    with pytest.raises(RefusedError, match="alternate"):
        found("llama2", chat(("user", "a"), ("user", "b")))


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma3", "no_prompt", "qwen3", "mistral"])
def test_forty_turns_cost_few_renderings(family: str) -> None:
    turns = [(role, "the quick brown fox") for _ in range(40) for role in ("user", "assistant")]
    counted: list[int] = []
    done = find_turns(renderer(family, counted), chat(*turns), range(1, 80, 2), MARKS[family])
    assert len(done.spans) == 40 and sum(counted) <= 5 * len(turns)
