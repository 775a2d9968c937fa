"""Where an assistant's turns lie in a rendered conversation: from the end of the generation prompt to the token at
which generation stops.

All of it by rendering prefixes of the conversation, as serving does: the text that a model is given before turn `i` is
the rendering of the turns before it with `add_generation_prompt`. No turn's content is ever replaced, so it does not
matter what a template does to contents (trims them, drops the reasoning of earlier turns, splits at marks). A template
that knows no generation prompt is shown two further turns instead: what both begin with is what would be one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

Messages = Sequence[Mapping[str, object]]
#: Renders messages, with the generation prompt behind them if asked; RefusedError where the template does not.
Render = Callable[[Messages, bool], str]


class RefusedError(Exception):
    """What a template refuses, or what cannot be found in what it rendered."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Texts of a tokenizer's special tokens, and of those among them at which generation stops."""

    special: tuple[str, ...]
    stops: tuple[str, ...]

    def pattern(self) -> re.Pattern[str]:
        """Finds any special token, the longest first."""
        return re.compile("|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True)) or r"(?!)")


NO_MARKS = Marks((), ())
#: Keys, and others for the same, in which a turn says what is learned beside its content.
_BESIDE = (("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking"))
#: A conversation that an assistant's turn could follow.
_ASKED: Messages = ({"role": "user", "content": "\ue000"},)
#: Turns that begin alike only where the template writes in front of them.
_PROBES: Messages = (
    {"role": "assistant", "content": "\ue000"},
    {"role": "assistant", "content": "\ue001", "reasoning_content": "\ue002"},
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; `spans[n]` is [begin, end) of the n-th turn asked for.

    The last turn may end with a mark that the template writes in front of the next turn only: it is at the end of
    `text` then. `rewritten`: the template shows less of a turn, or something else, once others follow.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    rewritten: bool


def find_turns(render: Render, messages: Messages, wanted: Sequence[int], marks: Marks) -> Rendered:
    """Render `messages` and find the turns `wanted` (ascending indices of assistant messages) in the text.

    RefusedError where the template refuses the conversation, or where a turn or its end is not to be found.
    """
    search = _Search(render, messages, marks, render(messages, False))
    spans = search.uniform(wanted) if len(wanted) > 2 else None
    if spans is None:
        spans = search.one_by_one(wanted)
    if any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)):
        raise RefusedError("the template shows turns of the assistant in a way in which they are not told apart")
    return Rendered(search.text, tuple(spans), search.rewritten)


def check_said(render: Render, messages: Messages, wanted: Sequence[int], names: Collection[str]) -> None:
    """RefusedError where the template, which reads `names`, shows nothing of what a turn of `wanted` says beside its
    content, while that turn is the last."""
    for at in wanted:
        for keys in _BESIDE:
            said = [key for key in keys if messages[at].get(key)]
            if not said or any(key in names for key in keys):
                continue
            bare = {key: value for key, value in messages[at].items() if key not in said}
            if render([*messages[:at], bare], False) == render(messages[: at + 1], False):
                raise RefusedError(
                    f"the template shows nothing of `{said[0]}` of message {at}: leave it out of the data, or name a "
                    "template that does, in data.template"
                )


def span_of_generation(text: str, begin: int, end: int, marks: Marks) -> tuple[int, int]:
    """The span that a template's own `{% generation %}` gives, with the end token that stands right behind it."""
    if _end_mark(text[begin:end], marks) is None and (found := marks.pattern().match(text, end)):
        end = found.end()
    return begin, end


class _Search:
    """One conversation's search."""

    def __init__(self, render: Render, messages: Messages, marks: Marks, text: str) -> None:
        self.render, self.messages, self.marks = render, messages, marks
        self.whole = self.text = text  # `text` may get an end mark behind the last turn
        self.special = marks.pattern()
        self.turns = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
        self.found: dict[int, tuple[int, int]] = {}
        self.rewritten = False
        self.prompts, self.header = self._first_header()

    def _first_header(self) -> tuple[bool, str]:
        """Whether the template writes a generation prompt, and what it writes in front of the first turn."""
        before = self.messages[: self.turns[0]]
        past, prompt = self._rendered(before), self._rendered(before, True)
        if prompt and prompt != past:
            return True, self._behind(past, prompt)
        if not before:  # what is written behind a user's turn
            asked, prompt = self._rendered(_ASKED), self._rendered(_ASKED, True)
            if asked and prompt and prompt != asked:
                return True, self._behind(asked, prompt)
        prompt = "" if past else self._rendered(self.messages, True)
        if prompt.startswith(self.whole) and len(prompt) > len(self.whole):
            return True, prompt[len(self.whole) :]
        shown = [text[len(past) :] for probe in _PROBES if (text := self._rendered([*before, probe])).startswith(past)]
        header = shown[0][: _common(*shown)] if len(shown) == len(_PROBES) else ""
        return False, header if header.strip() else ""

    def one_by_one(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Two renderings a turn: for any template, and n² in a conversation's length."""
        return [self.one(at) for at in wanted]

    def uniform(self, wanted: Sequence[int]) -> list[tuple[int, int]] | None:
        """All turns from a few renderings, where the template treats them alike; None where that is not certain.

        The generation prompt and the end mark of a turn must be special tokens, none of which stands in a message, so
        that it was the template that wrote them; a prompt must stand in the text once an assistant's turn, and the
        mark be the next special token. The first and the last turn are found by their own renderings, and must agree.
        """
        turns = self.turns
        # without a generation prompt it is the mark that ends what the user says ([/INST])
        header = self.header or _last_mark(self._rendered(self.messages[: turns[0]]), self.marks)
        if not self.special.search(header) or self.text.count(header) != len(turns):
            return None
        if self.special.search(json.dumps([*self.messages], ensure_ascii=False)):
            return None
        try:
            first, last = self.one(turns[0]), self.one(turns[-1])
        except RefusedError:  # the long way may know better, or says it again
            return None
        spans, at, ends = [], 0, {_last_mark(self.text[: last[1]], self.marks), *self.marks.stops}
        for _ in turns:
            begin = self.text.index(header, at) + len(header)
            end = self.special.search(self.text, begin)
            if end is None or end[0] not in ends:
                return None
            spans.append((begin, at := end.end()))
        if spans[0] != first or spans[-1] != last:
            return None
        return [spans[turns.index(at)] for at in wanted]

    def one(self, at: int) -> tuple[int, int]:
        """The span of turn `at`."""
        if at not in self.found:
            self.found[at] = self._one(at)
        return self.found[at]

    def _one(self, at: int) -> tuple[int, int]:
        begin, header = self._begin(at)
        alone = self.text if at == len(self.messages) - 1 else self.render(self.messages[: at + 1], False)
        if self.text.startswith(alone):
            if not alone[begin:].strip():
                raise RefusedError(f"the template renders nothing of message {at}")
            if (end := _end_mark(alone[begin:], self.marks)) is not None:
                return begin, begin + end
            return begin, self._next_mark(at, len(alone))
        # What stands here is not what the turn is while it is the last: it is learned as it stands.
        self.rewritten = True
        following = self.text.find(header, begin) if header else -1
        part = self.text[begin : following if following >= 0 else len(self.text)]
        own = _end_mark(alone, self.marks)
        mark = _last_mark(alone[:own], self.marks) if own is not None else ""
        if mark and (where := part.find(mark)) >= 0:
            return begin, begin + where + len(mark)
        found = [*self.special.finditer(part)]
        ending = next((one for one in found if one[0] in self.marks.stops), None)
        if ending is None:  # a mark that the next one follows: the turn's end, and the next turn's beginning
            pairs = zip(found, found[1:], strict=False)
            ending = next((one for one, two in pairs if not part[one.end() : two.start()].strip()), None)
        if ending is None and following >= 0 and found and not part[found[-1].end() :].strip():
            ending = found[-1]  # which a turn of the assistant follows
        if ending is None:
            raise self._endless(at)
        return begin, begin + ending.end()

    def _begin(self, at: int) -> tuple[int, str]:
        """Where turn `at` begins, and what the template puts in front of it."""
        before = self.messages[:at]
        past = self._rendered(before)
        try:
            prompt = self.render(before, True) if self.prompts else past + self.header
        except RefusedError as error:  # nothing, or no user's turn, comes before
            if self.header and (found := self.text.find(self.header, self._after(at))) >= 0:
                return found + len(self.header), self.header
            raise RefusedError(f"the template refuses the turns before message {at}: {error}") from error
        header = self._behind(past, prompt)
        if self.text.startswith(prompt):
            return len(prompt), header
        # Either the turn stands behind less than a generation prompt (templates that open the reasoning in it, and
        # drop that of turns that are over), or the turns before are rendered otherwise now that this one follows.
        place = len(past)
        if not self.text.startswith(past):
            after = self._after(at)
            part = self._behind(self._rendered(before[:-1]), past)  # of the message right before
            place = self.text.find(part, after) + len(part) if part and part in self.text[after:] else -1
            if before and before[-1].get("role") == "assistant":
                place = after + len(self.text[after:]) - len(self.text[after:].lstrip())
        cuts = {len(header), *(found.end() for found in re.finditer("\n", header))}
        cuts |= {found.end() for found in self.special.finditer(header)}
        fitting = [cut for cut in cuts if self.text.startswith(header[:cut], place)] if place >= 0 else []
        if not before and header.strip() and (found := self.text.find(header)) >= 0:
            return found + len(header), header  # behind what a conversation begins with
        if not fitting:
            raise RefusedError(
                f"message {at} does not stand behind a generation prompt in what the template renders, so that what "
                "would be learned is not what is generated"
            )
        return place + max(fitting), header[: max(fitting)]

    def _after(self, at: int) -> int:
        """Where the assistant's turn before `at` ends."""
        before = [turn for turn in self.turns if turn < at]
        return self.one(before[-1])[1] if before else 0

    def _behind(self, one: str, two: str) -> str:
        """What `two` has behind what it begins with as `one` does, special tokens left whole."""
        at = len(one) if two.startswith(one) else _common(one, two)
        near = max(0, at - max(map(len, self.marks.special), default=0))
        found = self.special.finditer(two, near, at + at - near)
        return two[next((mark.start() for mark in found if mark.start() < at < mark.end()), at) :]

    def _rendered(self, messages: Messages, prompt: bool = False) -> str:
        """As `render`; empty where the template refuses."""
        try:
            return self.render(messages, prompt)
        except RefusedError:
            return ""

    def _next_mark(self, at: int, limit: int) -> int:
        """End of the special token right behind `limit`: the mark of the next turn, where generation stops (GLM).

        A turn with none behind it gets the mark that the template would write in front of a further one.
        """
        behind = self.text[limit:]
        if last := at == len(self.messages) - 1:
            plain = {"role": "assistant", "content": "."}  # reasoning may go as soon as a turn follows
            if calls := self.messages[at].get("tool_calls"):
                plain |= {"tool_calls": calls}  # type: ignore[dict-item]
            talk = [*self.messages[:at], plain]
            alone = self._rendered(talk)
            both = self._rendered([*talk, {"role": "tool" if calls else "user", "content": "."}])
            behind = both[len(alone) :] if alone and both.startswith(alone) else ""
        space = len(behind) - len(behind.lstrip())
        found = self.special.match(behind, space)
        if found is None:
            raise self._endless(at)
        if last:
            self.text = self.whole[:limit] + behind[: found.end()]
        return limit + found.end()

    def _endless(self, at: int) -> RefusedError:
        return RefusedError(
            f"the template ends message {at} with no special token of the tokenizer: nothing would teach the model to "
            "stop there"
        )


def _end_mark(turn: str, marks: Marks) -> int | None:
    """Where the end mark of a turn ends that begins `turn` and may have space and further marks behind it.

    Of several marks at its end it is the first, or one that touches it and is where generation stops.
    """
    tail: list[tuple[int, int]] = []
    at = len(turn.rstrip())
    while mark := _last_mark(turn[:at], marks):
        tail.insert(0, (at - len(mark), at))
        at = len(turn[: at - len(mark)].rstrip())
    if not tail:
        return None
    for number, (start, end) in enumerate(tail):
        if number and start != tail[number - 1][1]:
            break
        if turn[start:end] in marks.stops:
            return end
    return tail[0][1]


def _last_mark(text: str, marks: Marks) -> str:
    """The special token that ends `text`, or nothing."""
    return max((mark for mark in marks.special if text.endswith(mark)), key=len, default="")


def _common(one: str, two: str) -> int:
    """Characters that two texts begin with alike, by halving: comparing slices is far faster than characters."""
    least, most = 0, min(len(one), len(two))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == two[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
