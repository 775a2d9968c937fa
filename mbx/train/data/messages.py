"""A conversation as a template takes it: its messages checked key by key, and the turns of it that are learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from converters.errors import UnsupportedError, UsageError
from mbx.text import near_miss
from mbx.train.model.sight import TEXT_ALONE

#: Keys that Transformers' templates and chat APIs give a message; a template may read more.
_KEYS = frozenset(
    "role content name tool_calls tool_call_id reasoning_content reasoning thinking function_call refusal".split()
)
#: Whether a turn is learned, as trainers spell it.
_WEIGHTS = ("weight", "train", "loss")
_ALL_KEYS = sorted({*_KEYS, *_WEIGHTS})
#: In which a part of type `image` names its file.
_IMAGE_KEYS = ("path", "image", "url")
_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "observation")
#: What an assistant's turn may hold in place of content.
_SPOKEN = ("tool_calls", "reasoning_content", "reasoning", "thinking", "function_call")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the template gets them, `variables` beside them, and the indices of the turns to learn."""

    messages: Sequence[Mapping[str, object]]
    learned: Sequence[int]
    #: Assistants' turns of weight 0.
    idle: Sequence[int] = ()
    #: Names of the images that the messages show, in order.
    images: Sequence[str] = ()
    variables: Mapping[str, object] = field(default_factory=dict)


def conversation(
    messages: object,
    names: Collection[str],
    learn: str,
    variables: Mapping[str, object],
    first: int = 0,
    blind: str = TEXT_ALONE,
) -> Conversation:
    """Check `messages`, of which those from `first` on may be learned; UsageError names what is wrong in which.

    `names`: what the template reads, known as keys therefore. `learn`: as `data.learn`. `blind`: why the messages can
    show no images, empty where they can.
    """
    if not isinstance(messages, list) or not messages:
        raise UsageError("`messages` must be a non-empty list")
    plain: list[Mapping[str, object]] = []
    learned: list[int] = []
    idle: list[int] = []
    images: list[str] = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UsageError(f"message {at} must be an object with `role` and `content`, got {_short(message)}")
        weighs = _weighs(at, message)
        kept = _message(
            at, {key: value for key, value in message.items() if key not in _WEIGHTS}, names, weighs, blind
        )
        images += _images(at, message.get("content"))
        plain.append(kept)
        if kept["role"] == "assistant" and at >= first:
            (learned if weighs else idle).append(at)
    return Conversation(plain, learned[-1:] if learn == "last" else learned, idle, images, variables)


def _message(
    at: int, message: Mapping[str, object], names: Collection[str], weighs: bool, blind: str
) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        hint = "`from` and `value` stand in `conversations`" if "from" in message else None
        raise UsageError(f"message {at} must have a string `role`, got {_short(role)}", hint=hint)
    if role not in _ROLES and role not in names:
        raise UsageError(
            f"message {at} has the role {role!r}", hint=near_miss(role, _ROLES, f"known: {', '.join(_ROLES)}")
        )
    known = _KEYS | set(names)
    kept: dict[str, object] = {}
    for key, value in message.items():
        if value is None and key != "content":  # columns of a table that other rows fill
            continue
        if key not in known:
            hint = near_miss(key, _ALL_KEYS, f"known: {', '.join(_ALL_KEYS)}")
            raise UsageError(f"message {at} has an unknown key `{key}`", hint=hint)
        kept[key] = value
    kept["content"] = _content(at, message.get("content"), blind)
    calls = kept.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise UsageError(f"message {at}: `tool_calls` must be a list of objects, got {_short(calls)}")
    empty = not kept["content"] or (isinstance(kept["content"], str) and not kept["content"].strip())
    if empty and role == "assistant" and weighs and not any(kept.get(key) for key in _SPOKEN):
        raise UsageError(f"message {at} is an empty turn of the assistant", hint='"weight": 0 leaves a turn unlearned')
    if empty and role == "user":
        raise UsageError(f"message {at} is an empty turn of the user")
    if kept["content"] is None and role not in ("assistant", "user"):
        raise UsageError(f"message {at} ({role}) must have a string `content`")
    return kept


def _content(at: int, content: object, blind: str) -> object:
    """Content as text; parts of text are joined, as templates that know parts do. Where an image is among them they
    stay parts, without its name, which is no matter of the template."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"message {at} must have a string `content`, or parts of text; got {_short(content)}")
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind == "image" and not blind:
            parts.append({"type": "image"})
            continue
        if kind != "text":
            hint = (
                'an image is {"type": "image", "path": …}'
                if kind == "image_url" and not blind
                else blind or TEXT_ALONE
            )
            raise UnsupportedError(f"message {at} has a part of type {kind!r}", hint=hint)
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UsageError(f"message {at}: a part of its content must be text, got {_short(part)}")
        parts.append({"type": "text", "text": text})
    shows = any(part["type"] == "image" for part in parts)
    return parts if shows else "".join(part["text"] for part in parts)


def _images(at: int, content: object) -> list[str]:
    """Names of the images among a message's parts, which `_content` has taken."""
    names = []
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") != "image":
            continue
        named = [part[key] for key in _IMAGE_KEYS if part.get(key) is not None]
        if len(named) != 1 or not isinstance(named[0], str) or not named[0]:
            keys = ", ".join(key for key in part if key != "type") or "nothing"
            raise UsageError(
                f"message {at}: an image is named by one path, got {keys}",
                hint='{"type": "image", "path": "images/0.png"}, its path from the file that names it',
            )
        names.append(named[0])
    return names


def _weighs(at: int, message: Mapping[str, object]) -> bool:
    """Whether a turn is learned by its own word."""
    given = {key: message[key] for key in _WEIGHTS if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # False and True too
            raise UsageError(f"message {at}: `{key}` must be 0 or 1, or false or true, got {_short(value)}")
    return all(given.values())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}…"
