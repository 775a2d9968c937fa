"""Prepared data: made once, found by content, never trusted from others; and what it comes to."""

from __future__ import annotations

import gzip
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _trainings import QWEN3

from converters.errors import StorageError, UsageError
from mbx.train.data import cache, corpora
from mbx.train.data.chosen import choose
from mbx.train.data.corpora import Found, data_identity, prepare_corpus
from mbx.train.data.rows import Examples, Stream, example_rows
from mbx.train.data.tokens import Encoder
from mbx.train.recipe.sections import Data
from tests.listed_examples import read_examples

ROWS = [{"prompt": f"q{n}", "completion": "a " * (n % 7 + 1)} for n in range(40)]
DATA = Data(kind="completion", length=16)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MBX_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "d.jsonl"


def prepared(path: Path, tokenizer, data: Data = DATA, vocab: int = 1 << 20) -> Found:  # type: ignore[no-untyped-def]
    return prepare_corpus(replace(data, path=str(path)), [str(path)], tokenizer, vocab)


def test_it_is_made_once_and_found_by_content(path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    first = prepared(path, tokenizer)
    assert not first.kept and len(first.corpus) == 40
    right = read_examples(DATA, path, tokenizer)
    for one, two in zip(first.corpus, right, strict=True):
        assert one.tokens.tolist() == two.tokens.tolist() and one.learn.tolist() == two.learn.tolist()
    assert first.corpus.facts.learned == sum(int(one.learn[1:].sum()) for one in right)
    assert first.corpus.learned().tolist() == [int(one.learn[1:].sum()) for one in right]
    assert first.corpus.place(3).endswith("d.jsonl:4")
    monkeypatch.setattr(corpora, "write_examples", None)  # nothing is made any more
    moved = path.rename(path.with_name("moved.jsonl"))
    again = prepared(moved, tokenizer, replace(DATA, length=99))
    assert again.kept and again.corpus.place(3).endswith("moved.jsonl:4")


def test_identity_is_of_content(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    first = data_identity(DATA, [prepared(path, tokenizer).corpus])
    packed = path.with_name("other.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert data_identity(DATA, [prepared(packed, tokenizer).corpus]) == first
    assert data_identity(replace(DATA, seed=7), [prepared(path, tokenizer).corpus]) != first
    path.write_text(path.read_text().replace("q3", "q4"))
    assert data_identity(DATA, [prepared(path, tokenizer).corpus]) != first


@pytest.mark.parametrize("file", ["tokens", "ends", "places", "corpus.json"])
def test_a_damaged_entry_is_made_again(path: Path, tokenizer, file: str) -> None:  # type: ignore[no-untyped-def]
    right = prepared(path, tokenizer).corpus.digest
    (entry,) = (path.parent / "cache" / "data").glob("*/")
    content = bytearray((entry / file).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / file).write_bytes(content)
    again = prepared(path, tokenizer)
    assert not again.kept and again.corpus.digest == right and prepared(path, tokenizer).kept


def test_what_others_may_write_is_not_used(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    prepared(path, tokenizer)
    (entry,) = (path.parent / "cache" / "data").glob("*/")
    (entry / "tokens").chmod(0o666)
    assert not prepared(path, tokenizer).kept
    real = entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to(real)
    assert not prepared(path, tokenizer).kept and real.is_dir() and not entry.is_symlink()
    (path.parent / "cache" / "data").chmod(0o777)
    with pytest.raises(StorageError, match="is not used") as caught:
        prepared(path, tokenizer)
    assert "MBX_CACHE_DIR" in (caught.value.hint or "")


def test_what_was_not_used_for_long_makes_room(path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def made(number: int) -> Found:
        path.write_text("\n".join(json.dumps({"prompt": f"{number}", "completion": f"a{n}"}) for n in range(40)))
        return prepared(path, tokenizer)

    def ended() -> None:
        """As if the processes that used entries were over."""
        for lock in cache._USED.values():
            os.close(lock)
        cache._USED.clear()

    ended()
    first = made(1)
    size = cache.taken_bytes()
    assert size == sum(one.stat().st_size for one in first.corpus.folder.iterdir())
    monkeypatch.setenv("MBX_CACHE_MAX", str(int(2.5 * size)))
    second = made(2)
    for age, found in ((200, first), (100, second)):
        os.utime(found.corpus.folder, (time.time() - age,) * 2)
    third = made(3)
    assert third.displaced == (0, 0) and cache.taken_bytes() > 2.5 * size  # all are in use
    ended()
    assert made(1).kept  # now the second is the oldest
    fourth = made(4)
    assert fourth.displaced[0] == 2 and not second.corpus.folder.exists() and not third.corpus.folder.exists()
    assert first.corpus.folder.exists() and fourth.corpus.folder.exists() and cache.taken_bytes() <= 2.5 * size
    monkeypatch.setenv("MBX_CACHE_MAX", "1")
    ended()
    fifth = made(5)
    assert fifth.corpus.folder.exists() and fifth.corpus.place(0).endswith("d.jsonl:1")  # never what was asked for


def test_a_bad_record_leaves_nothing_behind(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    with path.open("a") as file:
        file.write('\n{"prompt": "x"}\n{')
    with pytest.raises(UsageError, match=r"d\.jsonl:41: no shape"):
        prepared(path, tokenizer)
    assert not [entry for entry in (path.parent / "cache" / "data").iterdir() if entry.is_dir()]


def test_a_token_beyond_the_embedding_is_named(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    largest = prepared(path, tokenizer).corpus.facts.largest
    assert prepared(path, tokenizer, vocab=largest + 1).kept
    with pytest.raises(UsageError, match=rf"d\.jsonl:\d+: .* has id {largest}, and the embedding {largest} rows"):
        prepared(path, tokenizer, vocab=largest)


def test_choices(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    corpus = prepared(path, tokenizer).corpus
    train, held = choose(DATA, corpus, "d", share=0.25)
    assert held is not None and len(held) == 10
    assert sorted([*train.numbers, *held.numbers]) == list(range(40))
    short = replace(DATA, length=int(corpus.sizes.min()))
    with pytest.raises(UsageError, match="longer than data.length") as caught:
        choose(short, corpus, "d")
    assert "d.jsonl:" in caught.value.details[0]
    dropped, _ = choose(replace(short, too_long="drop"), corpus, "d")
    assert dropped.dropped == 40 - len(dropped) > 0
    cut, _ = choose(replace(short, too_long="truncate"), corpus, "d")
    assert len(cut) == 40 and max(map(len, (one.tokens for one in cut))) == short.length + 1
    assert cut.learned == sum(int(one.learn[1:].sum()) for one in cut)


def test_rows_from_disk_are_rows_from_memory(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    chosen, _ = choose(DATA, prepared(path, tokenizer).corpus, "d")
    here, there = (example_rows(DATA, one, 0) for one in (read_examples(DATA, path, tokenizer), chosen))
    assert isinstance(here, Examples) and isinstance(there, Examples) and here.packs == there.packs
    for index in range(here.count):
        assert np.array_equal(here.row(index).tokens, there.row(index).tokens)
        assert np.array_equal(here.row(index).mask, there.row(index).mask)
    path.write_text("\n".join(json.dumps({"text": f"number {n} of many"}) for n in range(20)))
    text = replace(DATA, kind="text", shuffle=False)
    stored = prepared(path, tokenizer, text).corpus
    rows = example_rows(text, choose(text, stored, "d")[0], 0)
    assert isinstance(rows, Stream)
    whole = np.concatenate([one.tokens for one in stored])
    for index in range(rows.count):
        assert np.array_equal(rows.row(index).labels, whole[16 * index + 1 : 16 * index + 17])


def test_marks_are_not_doubled(tokenizer) -> None:  # type: ignore[no-untyped-def]
    encoder, bos, eos = Encoder(tokenizer), tokenizer.bos_token, tokenizer.eos_token
    for front, back in (("hi", "yes"), (f"{bos}hi", f"yes{eos}")):
        (example,) = encoder.completions([front], [back])
        assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1
        assert example.tokens.tolist().count(tokenizer.bos_token_id) <= 1


def test_processes_share_one_preparation(path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Of two that start at once, one makes it and the other waits and finds it."""
    made = path.parent / "made"
    made.mkdir()
    children = []
    for number in range(2):
        if (child := os.fork()) == 0:
            kept = prepared(path, tokenizer).kept
            (made / f"{number}{kept}").touch()
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert sorted(name.name[1:] for name in made.iterdir()) == ["False", "True"]
