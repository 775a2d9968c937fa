"""Rows: what is learned, how examples are packed, and in which order they come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _trainings import QWEN3
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import StorageError, UsageError
from mbx.train.data.examples import of_kind
from mbx.train.data.rows import Pattern, example_rows, megatron_rows, micro_batches, pack
from mbx.train.data.tokens import Example
from mbx.train.recipe.sections import Data
from tests.listed_examples import read_examples


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3)


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def learned(tokenizer, example: Example) -> str:  # type: ignore[no-untyped-def]
    return tokenizer.decode(example.tokens[example.learn])


def chat(*turns: str) -> dict[str, object]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def test_only_assistant_turns_are_learned(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "d.jsonl", chat("who?", "me", "why?", "because"), chat("only"))
    many = read_examples(Data(), path, tokenizer)
    text = learned(tokenizer, many[0]).replace(" ", "")
    assert text == "me</s>because</s>"
    assert not many[1].learn.any()
    whole = tokenizer.apply_chat_template(chat("who?", "me", "why?", "because")["messages"], return_dict=False)
    assert many[0].tokens.tolist() == list(whole)


def test_templates_that_rewrite_turns(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A template may trim turns, or drop the reasoning of earlier ones: what it renders is what is learned."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ (m.content.split('zz')[-1] if not loop.last else m.content)"
        " | trim }}</s>{% endfor %}"
    )
    record = chat("a", "why zz first ", "b", "so zz second")
    (example,) = read_examples(Data(), write(tmp_path / "d.jsonl", record), other)
    assert learned(other, example).replace(" ", "") == "first</s>sozzsecond</s>"


def test_tokenizers_without_a_chat_template_read_completions_and_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(QWEN3)
    bare.chat_template = None
    path = write(tmp_path / "d.jsonl", {"prompt": "ask", "completion": "answer", "text": "ask answer"})
    for kind in ("completion", "text"):
        (example,) = read_examples(of_kind(Data(), kind), path, bare)
        assert example.learn[-1] and example.tokens[-1] == bare.eos_token_id
    write(path, {"prompt": "ask", "completion": "a"}, {"prompt": "ask", "completion": [{"role": "assistant"}]})
    with pytest.raises(UsageError, match=":2: the record has messages, and the first one had none"):
        read_examples(Data(kind="completion"), path, bare)


def test_completions(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "d.jsonl", {"prompt": "ask", "completion": "answer"})
    (example,) = read_examples(Data(kind="completion"), path, tokenizer)
    assert learned(tokenizer, example).replace(" ", "") == "answer</s>"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON object"),
        ({"text": "x"}, "messages"),
        ({"messages": []}, "non-empty"),
        ({"messages": [{"role": "user"}]}, "message 0"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ("[" * 100_000, "not valid JSON"),
        ('{"messages": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tokenizer, tmp_path: Path, line: object, words: str) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "d.jsonl", chat("q", "a"), "", line)
    with pytest.raises(UsageError, match=rf"d\.jsonl:3: .*{words}"):
        read_examples(Data(), path, tokenizer)


def test_only_line_feeds_end_a_line(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """JSON allows U+2028, U+2029 and U+0085 in strings as they are; a mark in front and CRLF are those of editors."""
    path = tmp_path / "d.jsonl"
    lines = [json.dumps(chat("a\u2028b\u0085c", "y\u2029z"), ensure_ascii=False), json.dumps(chat("q", "a"))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert len(read_examples(Data(), path, tokenizer)) == 2
    path.write_text("\n".join([*lines, "{"]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"d\.jsonl:3: not valid JSON"):
        read_examples(Data(), path, tokenizer)
    path.write_bytes(lines[1].encode() + b'\n{"messages": "caf\xe9"}')
    with pytest.raises(StorageError, match=r"d\.jsonl:2: not UTF-8"):
        read_examples(Data(), path, tokenizer)


def test_long_examples(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "d.jsonl", chat("q", "a"), chat("q", "b" * 90))
    with pytest.raises(UsageError, match="longer than data.length") as caught:
        read_examples(Data(length=40), path, tokenizer)
    assert "d.jsonl:2" in caught.value.details[0]
    assert len(read_examples(Data(length=40, too_long="drop"), path, tokenizer)) == 1
    cut = read_examples(Data(length=40, too_long="truncate"), path, tokenizer)
    assert [len(example.tokens) <= 41 for example in cut] == [True, True]


def test_files_without_anything_to_learn(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="no example"):
        read_examples(Data(), write(tmp_path / "d.jsonl", chat("only a question")), tokenizer)
    with pytest.raises(StorageError):
        read_examples(Data(), tmp_path / "nowhere.jsonl", tokenizer)


def test_text_is_one_stream(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "d.jsonl", *({"text": f"number {n} of many"} for n in range(20)))
    data = Data(kind="text", length=16, shuffle=False)
    examples = read_examples(data, path, tokenizer)
    rows = example_rows(data, examples, 0)
    stream = np.concatenate([example.tokens for example in examples])
    for index in range(3):
        row = rows.row(index)
        assert row.tokens.tolist() == stream[16 * index : 16 * index + 16].tolist()
        assert row.labels.tolist() == stream[16 * index + 1 : 16 * index + 17].tolist()


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_packing_places_everything_once(sizes: list[int], length: int) -> None:
    rows = pack(sizes, length)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= length for row in rows)
    # best fit: no two rows could have been one
    loads = sorted(sum(sizes[item] for item in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > length


@given(st.lists(st.integers(2, 12), min_size=1, max_size=12), st.booleans())
def test_rows_hold_their_examples(sizes: list[int], packed: bool) -> None:
    examples = [Example(np.arange(100 * n, 100 * n + size), np.arange(size) % 2 == 1) for n, size in enumerate(sizes)]
    rows = example_rows(Data(length=12, pack=packed, shuffle=False), examples, pad=7)
    seen = []
    for index in range(len(rows.packs)):  # type: ignore[attr-defined]
        row = rows.row(index)
        assert len(row.tokens) == len(row.labels) == len(row.mask) == len(row.positions) == 12
        ends = np.cumsum(row.lengths) if packed else [12]
        for first, last in zip([0, *ends], ends, strict=False):
            if row.tokens[first] == 7 or first == last:
                continue
            assert row.positions[first] == 0
            number = int(row.tokens[first]) // 100
            example = examples[number]
            count = len(example.tokens) - 1
            seen.append(number)
            assert row.tokens[first : first + count].tolist() == example.tokens[:-1].tolist()
            assert row.labels[first : first + count].tolist() == example.tokens[1:].tolist()
            assert row.mask[first : first + count].tolist() == example.learn[1:].tolist()
            assert row.positions[first : first + count].tolist() == list(range(count))
            assert not row.mask[first + count : last].any()
    assert sorted(seen) == list(range(len(sizes)))


def test_order_is_fixed_and_differs_by_epoch() -> None:
    examples = [Example(np.array([n, n + 1]), np.ones(2, bool)) for n in range(50)]
    rows = example_rows(Data(length=1, pack=False), examples, 0)
    first, second = ([int(rows.row(50 * e + n).tokens[0]) for n in range(50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [int(rows.row(n).tokens[0]) for n in range(50)] == first


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 3))
def test_ranks_share_a_step(dp: int, micro: int, step: int) -> None:
    rows = Pattern(97, 4, 0)
    dealt = [
        list(micro_batches(rows, step, global_batch=8, micro_batch=micro, dp=dp, dp_rank=rank)) for rank in range(dp)
    ]
    tokens = sorted(tuple(row.tokens.tolist()) for rank in dealt for batch in rank for row in batch)
    assert tokens == sorted(tuple(rows.row(8 * step + n).tokens.tolist()) for n in range(8))


def test_megatron_datasets(tmp_path: Path) -> None:
    """Mock documents, and a .bin/.idx pair that Megatron Core wrote."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from mbx.models.megatron.core.cpu import megatron_on_cpu
    from mbx.models.megatron.processes import process_group

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    for n in range(40):
        builder.add_document(torch.arange(10 * n, 10 * n + 10), [10])
    builder.finalize(str(tmp_path / "d.idx"))
    with megatron_on_cpu(), process_group():
        train, _ = megatron_rows(Data(kind="mock", length=16), 64, 8, 0)
        row = train.row(0)
        assert row.tokens[1:].tolist() == row.labels[:-1].tolist()
        data = Data(kind="indexed", path=str(tmp_path / "d"), length=16, split="1,0,0")
        train, _ = megatron_rows(data, 1000, 20, 0)
        seen = {int(token) for n in range(20) for token in train.row(n).tokens}
        assert len(seen) > 200 and max(seen) < 400
        with pytest.raises(StorageError, match="idx"):
            megatron_rows(Data(kind="indexed", path=str(tmp_path / "no")), 64, 8, 0)
        builder = IndexedDatasetBuilder(str(tmp_path / "one.bin"), dtype=np.int32)
        builder.add_document(torch.tensor([1, 2, 3]), [3])
        builder.finalize(str(tmp_path / "one.idx"))
        one = Data(kind="indexed", path=str(tmp_path / "one"), length=16)
        with pytest.raises(StorageError, match="one` has no tokens for valid"):  # 969 of 1,000 documents, rounded
            megatron_rows(one, 64, 8, 0)
        with pytest.raises(UsageError, match="leaves no documents to train on"):
            megatron_rows(replace(one, split="0,1,0"), 64, 8, 4)
        assert megatron_rows(replace(one, split="1,0,0"), 64, 8, 0)[0].row(0).tokens[:4].tolist() == [1, 2, 3, 1]
