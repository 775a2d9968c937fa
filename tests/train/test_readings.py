"""What records become under other tokenizers than fast ones, and calls under templates that want them otherwise."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from _trainings import QWEN3
from test_data import chat, learned, write
from transformers import AutoTokenizer, ByT5Tokenizer

from mbx.train.data.corpora import prepare_corpus
from mbx.train.proof.records import records
from mbx.train.recipe.sections import Data
from tests.listed_examples import read_examples


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(QWEN3)


class WithoutOffsets:
    """A tokenizer that gives a text's ids and no offsets, as those do that are Python alone; counts what it reads."""

    is_fast = False

    def __init__(self, tokenizer) -> None:  # type: ignore[no-untyped-def]
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> object:
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, text: str | list[str], **asked: object) -> dict[str, list[int]]:
        self.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return {"input_ids": self.tokenizer(text, **asked)["input_ids"]}


SPLIT = "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
#: A token may hold the end of what is given and the beginning of what is learned.
JOINED = "{% for m in messages %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}"


@pytest.mark.parametrize("template", [SPLIT, JOINED])
def test_tokenizers_without_offsets_learn_the_same(tokenizer, tmp_path: Path, template: str) -> None:  # type: ignore[no-untyped-def]
    """At the cost of some tokenisations of the whole, not of one a turn."""
    fast = copy.deepcopy(tokenizer)
    fast.chat_template = template
    talk = [word for n in range(40) for word in (f"what is {n} of it all", f"nothing but {n}, as it was before")]
    path = write(tmp_path / "d.jsonl", chat("who?", "me", "why?", "because"), chat(*talk))
    wanted = read_examples(Data(length=10**4), path, fast)
    slow = WithoutOffsets(fast)
    found = read_examples(Data(length=10**4), path, slow)  # type: ignore[arg-type]
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.learn.tolist() == other.learn.tolist()
    assert found[1].learn.sum() >= 40
    assert slow.characters < 3 * sum(len(tokenizer.decode(one.tokens)) for one in wanted)


def test_a_tokenizer_of_transformers_that_is_python_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ByT5's bytes, with a chat template, from its folder to prepared rows: the same data wherever it lies."""
    monkeypatch.setenv("MBX_CACHE_DIR", str(tmp_path / "cache"))
    own = ByT5Tokenizer(extra_ids=0)
    own.chat_template = SPLIT.replace("<s>", "")
    own.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    path = write(tmp_path / "d.jsonl", chat("é?", "ü", "why?", "because"))
    kept = []
    for folder in ("one", "two"):
        read = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert not read.is_fast
        found = prepare_corpus(Data(kind="chat"), (str(path),), read, 300)
        kept.append(found.kept)
        assert learned(read, found.corpus[0]) == "assistant: ü</s>assistant: because</s>".replace("assistant: ", "")
    assert kept == [False, True]


TOLD = (
    "{% for m in messages %}<s>{% for c in m.tool_calls or [] %}{{ SAID }}{% endfor %}"
    "{{ m.content or '' }}</s>{% endfor %}"
)


@pytest.mark.parametrize("said", ["c.function.arguments | tojson", "c.function.arguments + ''"])
@pytest.mark.parametrize("given", ['{"a": 1}', {"a": 1}])
def test_arguments_of_calls_reach_a_template_in_the_form_that_it_takes(  # type: ignore[no-untyped-def]
    tokenizer, tmp_path: Path, said: str, given: object
) -> None:
    """Chat APIs have JSON in a text, which most templates would quote once more, and some join with others."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = TOLD.replace("SAID", said)
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    record = {"messages": [{"role": "user", "content": "sum"}, turn]}
    (example,) = read_examples(Data(), write(tmp_path / "d.jsonl", record), other)
    wanted = other('<s>{"a": 1}</s>', add_special_tokens=False)["input_ids"][1:]
    assert example.tokens[example.learn].tolist() == wanted
    (proven,) = records(Data(kind="chat"), [json.dumps(record)], other)
    assert proven.tokens == tuple(example.tokens.tolist())
