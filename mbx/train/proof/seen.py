"""Chats with images as Transformers' own processor prepares them, without `mbx.train.data`'s part in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbx.models.transformers.processor import Processor
from mbx.train.data.sources import File, Saved
from mbx.train.proof.records import Record, chat_record, messages_of
from mbx.train.proof.rows import Held

if TYPE_CHECKING:
    import torch

#: What the processor gives that is text.
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_NAMES = ("path", "image", "url")


def shows_images(line: str) -> bool:
    """Whether a record is a chat with an image."""
    messages, _ = messages_of(json.loads(line))
    return any(_images(message) for message in messages or ())


def carried(record: object, source: File | Saved, work: Path, numbers: count[int]) -> object:
    """A record whose images are copied into `work` and named from there; as it is where it shows none."""
    if not isinstance(record, dict) or isinstance(source, Saved):
        return record
    text = json.dumps(record)
    if '"image"' not in text or not shows_images(text):
        return record
    copied: dict[str, Any] = json.loads(text)
    messages, _ = messages_of(copied)
    for part in (part for message in messages or () for part in _images(message)):
        key = next(key for key in _NAMES if part.get(key))
        name = f"image-{next(numbers)}{Path(part[key]).suffix}"
        shutil.copyfile(source.path.parent / part[key], work / name)
        part[key] = name
    return copied


def looking(tokenizer: Any, learned: str, folder: Path, model: Path) -> Callable[[Mapping[str, Any]], Record | None]:
    """What makes records of chats with images in `folder`, and None of others; `model` has the processor."""
    processor = Processor(model)

    def look(line: Mapping[str, Any]) -> Record | None:
        if not shows_images(json.dumps(line)):
            return None
        return seen_record(line, tokenizer, learned, folder, processor)

    return look


def inputs_of(one: Held, records: Sequence[Record]) -> Mapping[str, torch.Tensor]:
    """What Transformers' class takes of an example's images."""
    paths = tuple(picture.path for picture in one.pictures)
    return next((record.inputs for record in records if (record.tokens, record.pictures) == (one.tokens, paths)), {})


def seen_record(line: Mapping[str, Any], tokenizer: Any, learned: str, folder: Path, processor: Processor) -> Record:
    """Tokens, mask, and what the class takes of the images, of a chat whose images lie in `folder`."""
    messages, first = messages_of(line)
    assert messages is not None
    paths = [str(folder / _name(part)) for message in messages for part in _images(message)]
    bare, shown = (
        _shown(messages, lambda part: {"type": "image"}),
        _shown(messages, lambda part: _placed(part, folder)),
    )
    text_alone = chat_record(bare, first, line, tokenizer, learned)
    plain = [{k: v for k, v in message.items() if k not in ("weight", "train", "loss")} for message in shown]
    own, template = processor.own, tokenizer.chat_template
    more = {**(line.get("chat_template_kwargs") or {})}
    asked = {"chat_template": template, "return_dict": True, "return_tensors": "pt"}
    done = own.apply_chat_template(plain, tokenize=True, **asked, **more)
    tokens = tuple(map(int, done["input_ids"][0]))
    inputs = {name: value for name, value in done.items() if name not in _TEXT}
    learn = _expanded(own, tokenizer, plain, text_alone, paths, tokens)
    return Record(tokens, learn, tuple(paths), inputs)


def _expanded(
    own: Any,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    alone: Record,
    paths: Sequence[str],
    tokens: tuple[int, ...],
) -> tuple[bool, ...] | None:
    """Which `tokens` are learned, from those of the text without its images; None where they are not told apart."""
    from PIL import Image

    if alone.learn is None:
        return None
    text = own.apply_chat_template(messages, tokenize=False, chat_template=tokenizer.chat_template)
    short = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if tuple(short["input_ids"]) != alone.tokens:
        return None
    inside = [False] * len(text)
    for (start, end), value in zip(short["offset_mapping"], alone.learn, strict=True):
        inside[start:end] = [value] * (end - start)
    images = [Image.open(path).convert("RGB") for path in paths]
    asked = {"return_offsets_mapping": True, "return_text_replacement_offsets": True, "add_special_tokens": False}
    whole = own(images=[images], text=[text], **asked)
    if tuple(map(int, whole["input_ids"][0])) != tokens:
        return None
    chars: list[bool] = []
    last = 0
    for one in whole["text_replacement_offsets"][0]:
        start, end = one["span"]
        chars += [*inside[last:start], *[False] * len(one["replacement"])]
        last = end
    chars += inside[last:]
    return tuple(any(chars[start:end]) for start, end in whole["offset_mapping"][0])


def _images(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def _name(part: Mapping[str, Any]) -> str:
    return str(next(part[key] for key in _NAMES if part.get(key)))


def _placed(part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {"type": "image", "path": str(folder / _name(part))}


def _shown(messages: Sequence[Mapping[str, Any]], how: Any) -> list[dict[str, Any]]:
    """Messages in which each part that is an image is what `how` makes of it."""
    out = []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list):
            parts = [how(part) if part in _images(message) else part for part in parts]
        out.append({**message, "content": parts})
    return out
