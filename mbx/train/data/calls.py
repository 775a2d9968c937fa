"""Arguments of tool calls: chat APIs have them as JSON in a text, most templates take objects, and some take the text.

Servers turn text into objects before they render, so that comes first; a template that joins strings refuses objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

Messages = Sequence[Mapping[str, object]]


def forms(messages: Messages) -> list[Messages]:
    """The conversation with all arguments as objects, then with all as text; as it is where neither changes it."""
    found: list[Messages] = []
    for form in (_object, _text):
        changed = [_changed(message, form) for message in messages]
        if changed not in found:
            found.append(changed)
    return found


def _changed(message: Mapping[str, object], form: Callable[[object], object]) -> Mapping[str, object]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(call, form) for call in calls]}


def _call(call: object, form: Callable[[object], object]) -> object:
    """A call with its arguments in another form, inside `function` or not."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _object(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        read = json.loads(arguments)
    except ValueError:
        return arguments
    return read if isinstance(read, dict) else arguments


def _text(arguments: object) -> object:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
