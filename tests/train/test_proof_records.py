"""What the training's proof derives from records by itself, and when it passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _trainings import QWEN3

from mbx.proof.legs import Leg
from mbx.train.data.examples import of_kind
from mbx.train.proof.legs import rows_legs
from mbx.train.proof.records import first_records, records, windows
from mbx.train.proof.rows import held
from mbx.train.proof.training import Report
from mbx.train.recipe.sections import Data
from tests.listed_examples import read_examples

#: Drops the reasoning of earlier turns, as Qwen3's does.
REASONING = (
    "{% set last = messages | length - 1 %}{% for m in messages %}{{ '<s>' + m.role + ' ' }}"
    "{% if m.reasoning_content and loop.index0 == last %}{{ '(' + m.reasoning_content + ') ' }}{% endif %}"
    "{{ m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "how many"},
    {"role": "assistant", "content": "two of", "reasoning_content": "eight"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "one", "reasoning_content": "and"},
]
SHAPES: dict[str, dict[str, Any]] = {
    "messages, reasoning dropped": {"messages": TALK},
    "sharegpt": {"conversations": [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "two"}]},
    "alpaca": {"instruction": "say", "input": "it", "output": "two of it"},
    "messages of prompt and completion": {"prompt": TALK[:1], "completion": [{"role": "assistant", "content": "two"}]},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(QWEN3)
    made.chat_template = REASONING
    return made


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_tokens_and_a_mask_of_its_own(shape: str, learn: str, tmp_path: Path, tokenizer: Any) -> None:
    path, kind = tmp_path / "d.jsonl", "completion" if "prompt" in SHAPES[shape] else "chat"
    path.write_text(json.dumps(SHAPES[shape]) + "\n")
    data = Data(kind=kind, path=str(path), length=200, learn=learn)  # type: ignore[arg-type]
    (record,) = records(data, first_records(data, 8), tokenizer)
    (example,) = read_examples(data, path, tokenizer)
    assert record.tokens == tuple(example.tokens)
    assert record.learn is not None and record.learn[1:] == tuple(example.learn[1:]) and any(record.learn)


def test_texts_have_rows_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    from mbx.train.data.rows import example_rows

    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {n} of eight"}) + "\n" for n in range(9)))
    data = of_kind(Data(path=str(path), length=16, shuffle=False), "text")
    rows = example_rows(data, read_examples(data, path, tokenizer), 0)
    got = held([rows.row(n) for n in range(3)])
    assert {leg.status for leg in rows_legs(got, windows(data, tokenizer, 3))} == {"passed"}
    moved = held([rows.row(n) for n in range(1, 4)])
    assert rows_legs(moved, windows(data, tokenizer, 3))[0].status == "failed"


def test_records_of_a_mixture_come_in_turn(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 1)):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{name}{n}"}) + "\n" for n in range(count)))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    texts = [json.loads(line)["text"] for line in first_records(Data(path={a: 1.0, b: 1.0}), 3)]
    assert texts == ["a0", "b0", "a1"]
    assert [json.loads(line)["text"] for line in first_records(Data(path=(a, b)), 9)] == ["a0", "a1", "a2", "b0"]


def test_a_leg_that_did_not_run_passes_only_where_it_is_excused() -> None:
    ran, idle, bad = (
        Leg(name, status, "") for name, status in zip("abc", ("passed", "not run", "failed"), strict=True)
    )
    assert Report("r", "", (ran,)).passed
    assert not Report("r", "", (ran, idle)).passed
    assert Report("r", "", (ran, idle), frozenset("b")).passed
    assert not Report("r", "", (ran, bad), frozenset("c")).passed
